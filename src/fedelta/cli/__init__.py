"""The command line."""

from fedelta.cli.app import main

__all__ = ["main"]
