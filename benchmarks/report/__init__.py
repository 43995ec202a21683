"""Rows that are stored, and the tables made of them."""
