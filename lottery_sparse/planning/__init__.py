"""The fastest form of each layer, by measurement."""
