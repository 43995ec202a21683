"""Optimizers that step compact and masked layers by one kernel call, and a whole training step."""

from lottery_sparse.optim.groups import param_groups
from lottery_sparse.optim.optimizers import SGD, Adam, AdamW

__all__ = ["SGD", "Adam", "AdamW", "param_groups"]
