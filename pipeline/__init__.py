"""Code shared by capture and train: errors, configuration, the layer-id convention, hooks and the cache."""

__version__ = "0.1.0"
