"""Layers: masked, compact, supermask and packed."""
