"""Layers: masked, compact, supermask and packed."""

from lottery_sparse.nn.compact.layers import CompactConv2d, CompactLinear
from lottery_sparse.nn.forms.compacting import refresh_
from lottery_sparse.nn.masked import MaskedConv2d, MaskedLinear
from lottery_sparse.nn.packed import PackedLinear
from lottery_sparse.nn.supermask import SupermaskConv2d, SupermaskLinear

__all__ = [
    "CompactConv2d",
    "CompactLinear",
    "MaskedConv2d",
    "MaskedLinear",
    "PackedLinear",
    "SupermaskConv2d",
    "SupermaskLinear",
    "refresh_",
]
