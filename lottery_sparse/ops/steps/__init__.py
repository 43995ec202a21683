"""Steps of optimizers: many tensors in one call."""
