"""Runs executed: groups, engines, what is still to do."""
