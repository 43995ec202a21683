"""Data, models, the training loop, and the rounds of a lottery."""
