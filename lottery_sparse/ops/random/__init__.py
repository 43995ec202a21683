"""Counter-based randomness."""
