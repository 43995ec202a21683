"""Products with where(m, w, f)."""
