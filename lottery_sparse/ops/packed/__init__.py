"""Inference with packed weights."""
