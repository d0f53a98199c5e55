"""The Flower engine: the same rounds, run over processes and machines. No other package imports flwr."""
