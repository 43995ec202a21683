"""Masks, and the ideas of the paper: criteria, actions, pruning."""
