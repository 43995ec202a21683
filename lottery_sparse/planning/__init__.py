"""Which form is the fastest, layer by layer, by measurement."""
