"""Engines carry messages between the server and clients; all of them give the same numbers."""

from fedelta.federation.engines.observer import Observer

__all__ = ["Observer"]
