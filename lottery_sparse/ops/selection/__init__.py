"""Exact selection of the highest scores."""
