"""param_groups: which Parameters of a model an optimizer's weight decay is for."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator
from typing import Any

from torch import nn

from lottery_sparse.nn.masked import Masked
from lottery_sparse.ops.common.torch_private import NormBase

# normalisation layers, whose weights of any shape scale the normalised values
_NORMS = (NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The Parameters of a model for an optimizer, those that weight decay is for apart.

    >>> torch.optim.AdamW(ls.optim.param_groups(model, 0.1), lr=1e-3)

    Sorted by what a Parameter was in the dense model, so that masked, compact and dense models get
    the same groups:

        decayed   two dimensions and more: weights of linear layers and convolutions, embeddings;
                  the weight of a compact layer, which is one vector; the scores of supermask
                  layers, whose probabilities decay pulls to a half
        not       biases, of any shape; weights of normalisation layers; other vectors; scalars

    Rules that go by `p.dim()` alone take the vector of a compact layer for a bias.

    Args:
        model: any module. Parameters that do not require grad are left out: freeze first. Shared
            ones come once. Groups hold Parameters, so `ls.compact_` comes before, or gets the
            optimizer.
        weight_decay: of the first group, at least 0; that of the second is 0.

    Returns:
        Groups {"params", "param_names", "weight_decay"} in the order of `model.named_parameters()`;
        a group without Parameters is left out. torch's optimizers keep "param_names" in their
        state_dict, others ignore them.

    Raises:
        ValueError: a negative or infinite `weight_decay`, or no Parameter requires grad.
        TypeError: `weight_decay` is no number.
    """
    if isinstance(weight_decay, bool) or not isinstance(weight_decay, numbers.Real):
        raise TypeError(f"weight_decay must be a number, got {type(weight_decay).__name__}.")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay must be finite and at least 0, got {weight_decay}.")
    decayed: dict[int, bool] = {}  # id of a Parameter
    for module, name, parameter in _owned(model):
        decays = decayed.get(id(parameter), True) and _is_matrix(module, name, parameter)
        decayed[id(parameter)] = decays
    groups: list[dict[str, Any]] = [
        {"params": [], "param_names": [], "weight_decay": float(decay)}
        for decay in (weight_decay, 0)
    ]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = groups[0 if decayed[id(parameter)] else 1]
            group["params"].append(parameter)
            group["param_names"].append(name)
    found = [group for group in groups if group["params"]]
    if not found:
        raise ValueError(
            "model has no Parameter that requires grad; call model.requires_grad_() first."
        )
    return found


def _owned(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """(module, name in it, Parameter), a shared one once for each module."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield module, name, parameter


def _is_matrix(module: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    if isinstance(module, Masked) and name == "weight":
        return True  # of a compact layer too
    is_bias = "bias" in name  # may have two dimensions: [E, N] of E networks side by side
    return parameter.dim() >= 2 and not is_bias and not isinstance(module, _NORMS)
