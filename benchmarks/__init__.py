"""Measured, never asserted: what the kernels cost against the dense libraries."""
