"""Tickets, masks and the starts of their weights: found, stored and applied."""
