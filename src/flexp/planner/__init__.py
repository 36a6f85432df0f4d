"""According to its resources: what a device has, what a model costs it, and which cut follows."""
