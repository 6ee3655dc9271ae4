"""The command line: the only part that prints. Start-up stays light: torch and transformers are imported by need."""

from .main import main

__all__ = ["main"]
