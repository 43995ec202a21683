"""Learned masks: sampled bits, and products with them."""
