"""Conversions between the forms of a model, and the masks of whole models."""
