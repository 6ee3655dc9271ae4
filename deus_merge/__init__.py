"""Deeper language models by optimal transport: merge, fuse and up-scale checkpoints from YAML recipes."""

__version__ = "0.1.0"
