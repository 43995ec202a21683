"""Compact layers: the Parameter holds kept weights only."""
