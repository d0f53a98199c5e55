"""Engines carry messages between the server and the clients. All engines give the same numbers."""

from fedelta.federation.engines.observer import Observer

__all__ = ["Observer"]
