"""Several networks side by side, computed as one."""

from lottery_sparse.nn.forms.replicate import replicate, select

__all__ = ["replicate", "select"]
