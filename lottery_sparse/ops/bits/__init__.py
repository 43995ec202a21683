"""Masks as bits."""
