"""An example call of a model, and the input that each layer gets in it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lottery_sparse.nn.masked import Masked


def call_of(
    model: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the call."""
    signature = _signature(model)
    if not inputs and "example_inputs" in kwargs and "example_inputs" not in signature.parameters:
        warnings.warn(
            "example_inputs= goes; give what the model is called with, ls.plan(model, x).",
            FutureWarning,
            stacklevel=3,
        )
        inputs = (kwargs.pop("example_inputs"),)
    if len(inputs) != 1 or kwargs:
        return inputs, kwargs
    [only] = inputs
    if isinstance(only, tuple):
        return only, {}
    if not isinstance(only, Mapping) or not all(isinstance(name, str) for name in only):
        return inputs, {}
    try:
        signature.bind(**only)
    except TypeError as error:
        if not any(name in signature.parameters for name in only):
            return inputs, {}
        raise ValueError(
            f"inputs holds the keyword arguments {', '.join(only)}, which do not fit the forward "
            f"of {type(model).__name__}: {error}; give those that it has."
        ) from None
    return (), dict(only)


def _signature(model: nn.Module) -> inspect.Signature:
    """The signature of the forward; of a wrapper that hands everything on, that of its inside."""
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # of a compiled object that has none
        return inspect.signature(lambda *args: None)
    handed_on = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    if all(parameter.kind in handed_on for parameter in signature.parameters.values()):
        for name in ("module", "_orig_mod"):  # DataParallel and its kin, torch.compile
            inner = model._modules.get(name)
            if inner is not None:
                return _signature(inner)
    return signature


def inputs_of(
    model: nn.Module, layers: dict[str, Masked], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Tensor]:
    """The first input that each layer gets when the model is called."""
    seen: dict[str, Tensor] = {}

    def look(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            x = (*args, *kwargs.values())[0]
            if not isinstance(x, Tensor):
                raise TypeError(
                    f"inputs bring a {type(x).__name__} to {name}, which needs a tensor; give what "
                    "the model is called with: ls.plan(model, x, y, key=z)."
                )
            seen.setdefault(name, x.detach())

        return hook

    hooks = [
        layer.register_forward_pre_hook(look(name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    were_training = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for module, was_training in were_training:  # some may be in eval() on purpose
            module.training = was_training
        for hook in hooks:
            hook.remove()
    return seen
