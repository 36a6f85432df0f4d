"""Using what was trained: saved runs, whole models and adapters for other tools, scores and predictions."""
