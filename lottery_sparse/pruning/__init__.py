"""Masks, and the ideas of the paper: criteria, actions, pruning."""

from lottery_sparse.pruning.actions import MASK0_ACTIONS, MASK1_ACTIONS
from lottery_sparse.pruning.criteria import CRITERIA, SIGN_MASKS

__all__ = ["CRITERIA", "MASK0_ACTIONS", "MASK1_ACTIONS", "SIGN_MASKS"]
