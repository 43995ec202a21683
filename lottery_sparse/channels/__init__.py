"""Whole channels that a mask prunes, taken out of a model."""

from lottery_sparse.channels.drop import Channels, drop_channels

__all__ = ["Channels", "drop_channels"]
