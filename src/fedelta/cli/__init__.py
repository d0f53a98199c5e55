"""The command line of fedelta."""

from fedelta.cli.app import main

__all__ = ["main"]
