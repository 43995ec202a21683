"""PackedLinear and `pack_`: masked layers for inference, smaller and faster than dense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from lottery_sparse.compacting import expand_
from lottery_sparse.convert import become, check_masked
from lottery_sparse.densify import densify_, settle_bias
from lottery_sparse.modules import Masked, one_node
from lottery_sparse.ops.packed import check_x
from lottery_sparse.packing import FORMATS, scale_of, unfit

# Up to these densities a format beats the dense library at every batch from 1 to 32, by element
# size; measured at 4096 x 4096 on one Zen 4 core. Half-precision dense weights are half the bytes,
# and the dense library has twice the products.
MOST_CSR = {4: 0.25, 2: 0.15}
MOST_BITMAP = {4: 0.7, 2: 0.0}
# Smaller weights are in the cache, and a packed call takes 12 µs more than a dense one.
LEAST_CSR = 2**16
LEAST_BITMAP = 2**20


class PackedLinear(nn.Module):
    """y = x wᵀ + b with a packed w: for inference, without parameters or gradients.

    `format` is "ternary", "binary", "seeded", "csr", "delta", "bitmap" or "dense"; the buffers are
    the tensors that `lottery_sparse.formats` describes, and `bias`. state_dict holds them, and
    loading one takes the format that it has. Made by `ls.pack_`, or from a weight.

    Args:
        weight: [N, K], floating.
        bias: [N] or None.
        format: None = the smallest and fastest that holds `weight` exactly, see `choose_format`,
            which never takes "binary", "seeded" and "delta": their kernels are for CUDA.
        activations: "exact", or "int8" for ternary weights: rows of x are rounded to 8 bits.
        key: for "seeded": `ls.random.key(seed, stream, step)` of the signs that weights other than
            0 have.

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
        key: Tensor | None = None,
    ):
        super().__init__()
        self._pack(weight, bias, format, activations, key)

    def _pack(
        self,
        weight: Tensor,
        bias: Tensor | None,
        format: str | None,
        activations: str,
        key: Tensor | None = None,
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
        for name, tensor in zip(form.names, form.pack(weight, key), strict=True):
            self.register_buffer(name, tensor)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.dtype = weight.dtype

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
        """What the packed weight takes, without the bias."""
        return sum(part.numel() * part.element_size() for part in self._parts())

    @property
    def dense_bytes(self) -> int:
        """What the dense weight took."""
        return self.in_features * self.out_features * self.dtype.itemsize

    def extra_repr(self) -> str:
        int8 = self.format == "ternary" and self.activations != "exact"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={self.format}, bytes={self.bytes}"
            f"{', activations=int8' if int8 else ''}"
        )

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take the format, and the sizes, that the state has."""
        found = [
            name
            for name, form in FORMATS.items()
            if all(prefix + part in state_dict for part in form.names)
        ]
        if found:
            tensors = {name: state_dict[prefix + name] for name in FORMATS[found[0]].names}
            why = unfit(found[0], tensors, self.out_features, self.in_features)
            if why:
                error_msgs.append(f"{prefix}{why}")
                return
            device = self._parts()[0].device
            for name in FORMATS[self.format].names:
                del self._buffers[name]
            self.format = found[0]
            for name, tensor in tensors.items():
                self.register_buffer(name, torch.empty_like(tensor, device=device))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def choose_format(weight: Tensor) -> str:
    """Ternary if it holds [N, K] exactly, at any size; else by size and density of what is not
    zero: csr, bitmap or dense, the fastest.
    """
    if weight.numel() and scale_of(weight) is not None:
        return "ternary"
    kept = float((weight != 0).double().mean()) if weight.numel() else 1.0
    size = weight.element_size()
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return "dense"
    if kept <= MOST_CSR[size]:
        return "csr" if weight.numel() >= LEAST_CSR else "dense"
    return "bitmap" if kept <= MOST_BITMAP[size] and weight.numel() >= LEAST_BITMAP else "dense"


# ---- whole models ------------------------------------------------------------------------------


def pack_(
    model: nn.Module,
    *,
    activations: str = "exact",
    report: Callable[[str], object] | None = print,
) -> nn.Module:
    """Replace masked and compact layers by packed ones for inference, in place.

    Each linear layer takes the format that `choose_format` names: ternary where all effective
    weights but zeros have one magnitude (per matrix or per row), else kept weights with columns or
    a bitmap, else dense. Frozen values other than zero are weights like the others. Convolutions
    become dense nn.Conv2d: there are no packed kernels for them. A bias that torch.nn.utils.prune
    prunes becomes what is left of it. The model is set to eval mode, and Parameters that it still
    has no longer require grad.

    Args:
        model: any module; a single masked layer too.
        activations: "exact", or "int8": ternary layers round each row of their input to 8 bits.
        report: called with a table of the layers; None = silence. With "int8" it shows each
            layer's relative error for standard normal inputs; for your own see
            `PackedLinear.activation_error`.

    Returns:
        `model`.

    Raises:
        ValueError: `activations` is unknown, or there is no masked layer.
        TypeError: a masked layer is a subclass with behaviour of its own, or holds several
            networks side by side.
    """
    if activations not in ("exact", "int8"):
        raise ValueError(f'activations must be "exact" or "int8", got {activations!r}.')
    check_masked(model)
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, Masked)]
    for name, layer in layers:
        if not type(layer).__module__.startswith("lottery_sparse."):
            raise TypeError(
                f"{name or 'the model itself'} is a {type(layer).__name__}, which has no packed "
                "form; replace it by a MaskedLinear with its effective weight."
            )
        if layer.effective_weight.dim() != (4 if isinstance(layer, nn.Conv2d) else 2):
            raise TypeError(
                f"{name or 'the model itself'} holds several networks side by side; pack each of "
                "them alone."
            )
    for _, layer in layers:
        settle_bias(layer)
    expand_(model)
    lines = []
    for name, layer in layers:
        if isinstance(layer, nn.Conv2d):
            densify_(layer)
            lines.append((name, "dense", "convolutions have no packed form"))
        else:
            packed = _replace(layer, activations)
            note = f"{packed.bytes / 1e6:.3f} MB of {packed.dense_bytes / 1e6:.3f}"
            if activations == "int8" and packed.format == "ternary":
                note += f", int8 activations: error {_error_of_normal(packed):.2%}"
            lines.append((name, packed.format, note))
    if report is not None:
        width = max((len(name) for name, *_ in lines), default=0)
        report("\n".join(f"{name:{width}}  {format:8} {note}" for name, format, note in lines))
    return model.eval().requires_grad_(False)


def _replace(layer: Masked, activations: str) -> PackedLinear:
    """A class swap: hooks, name and identity stay."""
    weight, bias = layer.effective_weight.detach(), layer.bias
    layer._parameters.clear()
    layer._buffers.clear()
    layer._non_persistent_buffers_set.clear()
    del layer._frozen_descriptor, layer._rest
    become(layer, PackedLinear)
    assert isinstance(layer, PackedLinear)
    layer._pack(weight, bias, None, activations)
    return layer


def _error_of_normal(layer: PackedLinear) -> float:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, layer.in_features, generator=generator)
    return layer.activation_error(x.to(layer._parts()[0].device))
