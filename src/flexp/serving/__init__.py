"""Personal language models that write: opened from a run, a folder or a running server, and used."""
