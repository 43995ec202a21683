"""PackedLinear: a linear layer for inference, smaller and faster than dense."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from lottery_sparse.nn.common import one_node, outside_inference_mode
from lottery_sparse.nn.loading import CheckedLoad, LayerLoad
from lottery_sparse.nn.packed_formats import (
    FORMATS,
    GONE,
    check_parts,
    check_tensor,
    format_of,
    scale_of,
)
from lottery_sparse.ops.bits.reference import words_per_row
from lottery_sparse.ops.compact.kept import NARROW
from lottery_sparse.ops.limits import LEAST_BITMAP, LEAST_CSR, MOST_BITMAP, MOST_CSR
from lottery_sparse.ops.packed.formats import BLOCK
from lottery_sparse.ops.packed.op import check_x


class PackedLinear(CheckedLoad):
    """y = x wᵀ + b with a packed w: for inference, without parameters or gradients.

    `format` is "ternary", "csr", "bitmap" or "dense"; the buffers are
    the tensors that `ops/packed/formats.py` describes, and `bias`. state_dict holds them, and
    loading one takes the format that it has. Made by `ls.pack_`, or from a weight.

    >>> layer = ls.nn.PackedLinear(weight.sign() * mask)
    >>> layer.format, layer.bytes, layer.dense_bytes
    ('ternary', 132, 800)

    Args:
        weight: [N, K], floating.
        bias: [N] or None.
        format: None = the fastest that holds `weight` exactly in fewer bytes than dense, see
            `choose_format`. A named one may take more than dense: see `bytes` and `dense_bytes`.
        activations: "exact", or "int8" for ternary weights: rows of x are rounded to 8 bits.

    Raises:
        ValueError: the format cannot hold the weight, or an unknown name.
    """

    in_features: int
    out_features: int
    format: str
    activations: str
    bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        format: str | None = None,
        activations: str = "exact",
    ):
        super().__init__()
        self._pack(weight, bias, format, activations)

    def _pack(
        self, weight: Tensor, bias: Tensor | None, format: str | None, activations: str
    ) -> None:
        if activations not in ("exact", "int8"):
            raise ValueError(f'activations must be "exact" or "int8", got {activations!r}.')
        if weight.dim() != 2 or not weight.is_floating_point():
            raise ValueError(
                f"weight must be floating [N, K], got {weight.dtype} {tuple(weight.shape)}."
            )
        weight = weight.detach()
        self.out_features, self.in_features = weight.shape
        self.format = choose_format(weight) if format is None else format
        self.activations = activations
        if self.format not in FORMATS:
            raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}.")
        form = FORMATS[self.format]
        for name, tensor in zip(form.names, form.pack(weight), strict=True):
            self.register_buffer(name, tensor)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.dtype = weight.dtype

    def _enter_packed(self, weight: Tensor, bias: Tensor | None, activations: str) -> None:
        """From a linear layer to a packed one: of its tensors nothing else stays."""
        for held in (self._parameters, self._buffers, self._non_persistent_buffers_set):
            held.clear()
        self._pack(weight, bias, None, activations)

    def _leave_packed(self) -> None:
        """From packed to linear: the weight and the bias become Parameters, which are frozen."""
        own = {"weight": self.effective_weight, "bias": self.bias}
        self._buffers.clear()
        for name in ("format", "activations", "dtype"):
            del self.__dict__[name]
        for name, value in own.items():
            parameter = None
            if value is not None:
                parameter = nn.Parameter(
                    outside_inference_mode(value.detach().clone()), requires_grad=False
                )
            self.register_parameter(name, parameter)

    def forward(self, input: Tensor) -> Tensor:
        """x [..., K] -> [..., N], dtype of x; RuntimeError if x requires grad under grad mode."""
        if isinstance(input, Proxy):
            return one_node(self, input)
        return self._multiply(input, self.activations)

    def _multiply(self, x: Tensor, activations: str) -> Tensor:
        check_x(x)
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, but the layer needs [..., {self.in_features}]."
            )
        multiply = FORMATS[self.format].multiply
        return multiply(
            x, *self._parts(), self.bias, rows=self.out_features, activations=activations
        )

    def _parts(self) -> list[Tensor]:
        """The tensors of the format."""
        parts = [self._buffers[name] for name in FORMATS[self.format].names]
        return [part for part in parts if part is not None]

    def activation_error(self, x: Tensor) -> float:
        """‖y(int8) − y(exact)‖ / ‖y(exact)‖ of x wᵀ, without the bias; 0 if not ternary."""
        if self.format != "ternary":
            return 0.0
        bias, self.bias, x = self.bias, None, x.detach().to(torch.float32)
        try:
            with torch.no_grad():
                exact = self._multiply(x, "exact").double()
                rounded = self._multiply(x, "int8").double()
        finally:
            self.bias = bias
        return float((rounded - exact).norm() / exact.norm().clamp(min=1e-300))

    @property
    def effective_weight(self) -> Tensor:
        """The weight, unpacked: [N, K]."""
        unpack = FORMATS[self.format].unpack
        return unpack(self.out_features, self.in_features, *self._parts())

    @property
    def bytes(self) -> int:
        """Bytes of the packed weight, without the bias."""
        return sum(part.numel() * part.element_size() for part in self._parts())

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense weight."""
        return self.in_features * self.out_features * self.dtype.itemsize

    def extra_repr(self) -> str:
        int8 = self.format == "ternary" and self.activations != "exact"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={self.format}, bytes={self.bytes}"
            f"{', activations=int8' if int8 else ''}"
        )

    def _entries(self, load: LayerLoad) -> Any:
        """The format, and the tensors of it in the sizes that the state has."""
        try:
            taken = self._taken(load.state, load.prefix, load.assign)
        except ValueError as error:
            raise ValueError(f"{load.prefix}{error}") from error
        if taken is not None:
            load.hide(load.names(*taken[1]))
            load.own.update(load.names(*taken[1], *FORMATS[self.format].names))
        return taken

    def _take(self, load: LayerLoad, entries: Any) -> None:
        for name in FORMATS[self.format].names:
            del self._buffers[name]
        self.format, parts = entries
        for name, part in parts.items():
            self.register_buffer(name, part)

    def _taken(
        self, state_dict: Any, prefix: str, assign: bool
    ) -> tuple[str, dict[str, Tensor]] | None:
        """The format and the tensors of it that a state has, as the layer will hold them.

        Raises:
            ValueError: they are no packed weight of this layer, or the bias is none.
        """
        bias = state_dict.get(f"{prefix}bias")
        if self.bias is not None and bias is not None:
            check_tensor("bias", bias)
            if bias.shape != self.bias.shape or not bias.is_floating_point():
                raise ValueError(
                    f"bias must be floating {tuple(self.bias.shape)}, got {bias.dtype} "
                    f"{tuple(bias.shape)}."
                )
        names = {name for form in FORMATS.values() for name in form.names}.union(*GONE.values())
        format = format_of(name for name in names if prefix + name in state_dict)
        if format is None:
            return None
        parts = {name: state_dict[prefix + name] for name in FORMATS[format].names}
        check_parts(format, parts, self.out_features, self.in_features)
        if not assign:
            device = self._parts()[0].device
            parts = {name: part.to(device, copy=True) for name, part in parts.items()}
        return format, {name: part.detach().contiguous() for name, part in parts.items()}


def choose_format(weight: Tensor) -> str:
    """The fastest format that holds [N, K] exactly and takes fewer bytes than dense, else dense.

    Ternary comes first, at any size; then, by size and density of what is not zero, csr or bitmap.
    """
    if not weight.numel():
        return "dense"
    rows, columns = weight.shape
    kept, element = int(weight.count_nonzero()), weight.element_size()
    starts = 8 * (rows + 1)
    found: dict[str, int] = {}  # bytes
    scale = scale_of(weight)
    if scale is not None:
        blocks = -(-rows // BLOCK) * -(-columns // BLOCK)
        found["ternary"] = 4 * BLOCK * blocks + element * len(scale)
    if weight.dtype in (torch.float32, torch.bfloat16):
        density = kept / weight.numel()
        if density <= MOST_CSR[element]:
            if weight.numel() >= LEAST_CSR:
                found["csr"] = kept * (element + (2 if columns <= NARROW else 4)) + starts
        elif density <= MOST_BITMAP[element] and weight.numel() >= LEAST_BITMAP:
            found["bitmap"] = kept * element + 4 * rows * words_per_row(columns) + starts
    dense = weight.numel() * element
    return next((format for format, size in found.items() if size < dense), "dense")
