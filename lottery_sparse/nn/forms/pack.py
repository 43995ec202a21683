"""pack_: whole models of masked layers to packed ones, for inference."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from lottery_sparse.nn.forms.compacting import expand_layers_
from lottery_sparse.nn.forms.convert import become, check_tied
from lottery_sparse.nn.forms.densify import densify_layers_, settle_bias
from lottery_sparse.nn.masked import Masked
from lottery_sparse.nn.packed import PackedLinear


def pack_layers_(
    model: nn.Module, activations: str, report: Callable[[str], object] | None
) -> nn.Module:
    """`ls.pack_` for masked and compact layers."""
    check_tied(model)
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
    expand_layers_(model)
    lines: list[tuple[str, str, int, int, str]] = []
    for name, layer in layers:
        if isinstance(layer, nn.Conv2d):
            densify_layers_(layer)
            size = layer.weight.nbytes
            lines.append((name, "dense", size, size, "convolutions have no packed form"))
        else:
            packed = _replace(layer, activations)
            note = ""
            if activations == "int8" and packed.format == "ternary":
                note = f"int8 activations: error {_error_of_normal(packed):.2%}"
            lines.append((name, packed.format, packed.bytes, packed.dense_bytes, note))
    if report is not None:
        report(_table(lines))
    return model.eval().requires_grad_(False)


def _table(lines: list[tuple[str, str, int, int, str]]) -> str:
    """Layer, format, bytes of the weight against dense, and a note; a last line for all."""
    sizes = sum(line[2] for line in lines), sum(line[3] for line in lines)
    cells = []
    for name, format, size, dense, note in [*lines, ("total", "", *sizes, "")]:
        share = f"{size / dense if dense else 1:.3f} of dense"
        cells.append((name, format, f"{size / 1e3:,.1f}", f"{dense / 1e3:,.1f}", share, note))
    name, number = max(len(line[0]) for line in cells), max(len(line[3]) for line in cells)
    return "\n".join(
        f"{n:{name}}  {format:8} {size:>{number}} of {dense:>{number}} kB, {share}  {note}".rstrip()
        for n, format, size, dense, share, note in cells
    )


def _replace(layer: Masked, activations: str) -> PackedLinear:
    """A class swap: hooks, name and identity stay."""
    weight, bias = layer.effective_weight.detach(), layer.bias
    layer._leave_masked()
    become(layer, PackedLinear)
    assert isinstance(layer, PackedLinear)
    layer._enter_packed(weight, bias, activations)
    return layer


def _error_of_normal(layer: PackedLinear) -> float:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, layer.in_features, generator=generator)
    return layer.activation_error(x.to(layer._parts()[0].device))
