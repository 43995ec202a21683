"""Scripts that reproduce the studies of "Deconstructing Lottery Tickets"; see README.md."""
