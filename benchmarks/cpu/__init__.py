"""Kernels and steps on this CPU, beside the dense library and peers."""
