"""What layers of all forms share: tensors they may store, draws of weights, nodes of torch.fx."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy


def outside_inference_mode(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it if it was created in torch.inference_mode.

    Autograd cannot save an inference tensor, and nobody may write to one outside of the mode. So
    layers never store one.
    """
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False), torch.no_grad():
        return tensor.clone()


def has_hooks(tensor: Tensor) -> bool:
    """Whether the tensor has hooks on its gradient."""
    return bool(tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None))


def one_node(layer: nn.Module, input: Proxy) -> Any:
    """The node that torch.fx.symbolic_trace puts into its graph for a call of the layer.

    A layer of ours stays one node, as torch's layers do: the traced module holds the layer itself,
    with its masks and its state_dict.

    Raises:
        TypeError: the layer itself is traced, and not a model that calls it.
    """
    path = input.tracer.path_of_module(layer)  # pyright: ignore[reportAttributeAccessIssue]
    if not path:
        raise TypeError(
            f"torch.fx cannot trace a {type(layer).__name__} by itself, only a model that calls "
            "one; trace nn.Sequential(layer)."
        )
    return input.tracer.create_proxy("call_module", path, (input,), {})


@torch.no_grad()
def redraw_(weight: Tensor, bias: Tensor | None, dense_type: type[nn.Module], rank: int) -> None:
    """Draw a weight and bias by the `reset_parameters` of the dense layer.

    E networks side by side are drawn one after another, since the law of a draw depends on the
    number of inputs of one network.
    """
    reset: Any = dense_type.reset_parameters  # pyright: ignore[reportAttributeAccessIssue]
    if weight.dim() == rank:
        reset(SimpleNamespace(weight=weight, bias=bias))
        return
    for e, one in enumerate(weight):
        reset(SimpleNamespace(weight=one, bias=None if bias is None else bias[e]))
