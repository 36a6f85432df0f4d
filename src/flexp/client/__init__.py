"""The device's side: the personal model and its training loop."""
