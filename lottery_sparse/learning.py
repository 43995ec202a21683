"""Learned masks: which of them a supermask model evaluates with."""

from lottery_sparse.nn.forms.learning import sampled, use_masks_

__all__ = ["sampled", "use_masks_"]
