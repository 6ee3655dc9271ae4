"""The command line, the only part that prints. For a fast start, torch and transformers are imported when needed."""

from .main import main

__all__ = ["main"]
