"""Whole channels that a mask prunes, taken out of a model."""
