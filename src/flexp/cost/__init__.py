"""What clients run on: device classes, what a step costs there, and a virtual clock."""
