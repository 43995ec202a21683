"""Tickets: masks and what their weights start from, found, stored and applied."""
