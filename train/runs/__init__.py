"""A run on disk: its directory, its checkpoints, and the figures next to them."""
