"""A run on several machines: the server and the clients as processes of their own."""
