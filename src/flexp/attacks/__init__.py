"""What is read of activations and gradients, by attacks that a server could make."""
