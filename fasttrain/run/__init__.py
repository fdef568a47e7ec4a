"""A run on disk: its configuration, history, model and checkpoint."""
