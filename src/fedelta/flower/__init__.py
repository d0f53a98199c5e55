"""Flower as the engine: the same rounds over processes and machines. Nothing outside this folder imports flwr."""
