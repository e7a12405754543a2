"""A run on disk: its directory, its checkpoints, and the figures beside them."""
