"""Rows on disk: what was computed, how, and by what arithmetic."""
