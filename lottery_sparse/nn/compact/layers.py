"""CompactLinear and CompactConv2d: masked layers whose Parameter holds kept weights only."""

from __future__ import annotations

import inspect

import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from lottery_sparse.nn.common import one_node
from lottery_sparse.nn.compact.base import Compact
from lottery_sparse.nn.masked import Masked, MaskedConv2d, MaskedLinear
from lottery_sparse.ops import masked_conv2d, masked_linear
from lottery_sparse.ops.compact import op as products
from lottery_sparse.ops.limits import kernels_take
from lottery_sparse.pruning.mask_tensor import plain


class CompactLinear(Compact, nn.Linear):
    """A MaskedLinear whose Parameter, gradient and optimizer state hold kept weights only.

    Made by `ls.compact_`. A new one, `CompactLinear(K, N)`, keeps every weight.

    >>> layer = ls.compact_(model)[0]
    >>> layer.weight.shape, layer.effective_weight.shape
    (torch.Size([40]), torch.Size([10, 20]))
    """

    rank = 2
    dense_type, masked_type = nn.Linear, MaskedLinear
    __signature__ = inspect.signature(nn.Linear)

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return one_node(self, input)
        if input.dim() == 0 or input.size(-1) != self.in_features:
            raise ValueError(
                f"input has shape {tuple(input.shape)}, but this layer needs "
                f"[..., {self.in_features}]."
            )
        # asked in two steps, since each forward asks
        if not self._derived.follows(self._buffers) and self._buffers_were_swapped():
            return masked_linear(
                input,
                self._spread(),
                plain(self.weight_mask),
                self.bias,
                self._frozen_state().for_op(),
            )
        weight, effective = self._weights()
        own = self._parameters  # a replica has none
        return products.linear(
            input,
            weight,
            self._derived.kept,
            effective,
            own["bias"] if "bias" in own else self.bias,  # noqa: SIM401, which asks both
            self._buffers["weight_frozen"] is None,  # `zero`, without a call
            self.products,
        )


class CompactConv2d(Compact, nn.Conv2d):
    """A MaskedConv2d whose Parameter, gradient and optimizer state hold kept weights only.

    Made by `ls.compact_`; a new one keeps every weight.

    >>> layer = ls.sparsify_(nn.Conv2d(3, 16, 3))
    >>> ls.set_masks_(layer, {"weight": torch.arange(432).view(16, 3, 3, 3) % 8 == 0})
    >>> ls.compact_(layer).weight.shape
    torch.Size([54])
    """

    rank = 4
    dense_type, masked_type = nn.Conv2d, MaskedConv2d
    __signature__ = inspect.signature(nn.Conv2d)

    def _has_kernels(self) -> bool:
        return kernels_take(self.stride)

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return one_node(self, input)
        foreign, padding = self._buffers_were_swapped(), self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        elif isinstance(padding, str):  # "same", "valid": as numbers
            around = self._reversed_padding_repeated_twice
            if around[0] != around[1] or around[2] != around[3]:
                input, padding = F.pad(input, around), 0
            else:
                padding = (around[2], around[0])
        if foreign:
            return masked_conv2d(
                input,
                self._spread(),
                plain(self.weight_mask),
                self.bias,
                self._frozen_state().for_op(),
                self.stride,
                padding,
                self.dilation,
                self.groups,
            )
        weight, effective = self._weights()
        return products.compact_conv2d(
            input,
            weight,
            self._derived.kept,
            effective,
            self.bias,
            self.zero,
            self.stride,
            padding,
            self.dilation,
            self.groups,
        )


COMPACT_TYPES: dict[type[Masked], type[Compact]] = {
    MaskedLinear: CompactLinear,
    MaskedConv2d: CompactConv2d,
}
