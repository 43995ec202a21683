"""Functions that model.apply(fn) runs over compact layers: they see a dense weight."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lottery_sparse.ops.compact.reference import gather_kept

_Tensor: Any = Tensor  # whose properties are public in all but name
# What is asked of, or done to, the Parameter itself.
_OWN = {
    _Tensor.requires_grad_, _Tensor.requires_grad.__get__, _Tensor.requires_grad.__set__,
    _Tensor.grad.__get__, _Tensor.grad.__set__, _Tensor.grad.__delete__, _Tensor.is_leaf.__get__,
    _Tensor.register_hook, _Tensor.register_post_accumulate_grad_hook, _Tensor.__hash__,
    _Tensor.__repr__, _Tensor.data_ptr,
}  # fmt: skip


def _is_of_fn(func: Callable) -> bool:
    """Whether `fn` calls this function by itself, or by torch.nn.init, and not through a layer.

    What layers do to their own weights (half, reset_parameters, state_dict) is not for the dense.
    """
    caller = sys._getframe(2).f_globals.get("__name__") or ""
    if caller == "torch.nn.init" or getattr(func, "__module__", None) == "torch.nn.init":
        return True
    return caller.partition(".")[0] not in ("torch", "lottery_sparse")


class DenseInit(TorchFunctionMode):
    """While it is active, functions of torch get a dense weight in place of the compact one.

    Initialisers of torch.nn.init ask for a weight's fans, and draw as many numbers as it has: so
    they draw those of the masked layer, of which the kept ones are taken at the end. The Parameter
    stays the same, also for who collects it or sets its requires_grad.
    """

    def __init__(self, layer: Any):
        super().__init__()
        self.layer, self.weight = layer, layer._parameters["weight"]
        self.dense: Tensor | None = None  # made when something asks for it

    def __torch_function__(
        self, func: Callable, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs, given = kwargs or {}, [*args, *(kwargs or {}).values()]
        if not any(value is self.weight for value in given) or func in _OWN or not _is_of_fn(func):
            return func(*args, **kwargs)
        if self.dense is None:
            dense = self.layer.effective_weight.detach().clone()
            self.dense = dense.requires_grad_(self.weight.requires_grad)
        result = func(*map(self._seen, args), **{k: self._seen(v) for k, v in kwargs.items()})
        return self.weight if result is self.dense else result

    def _seen(self, value: Any) -> Any:
        return self.dense if value is self.weight else value

    @torch.no_grad()
    def take(self) -> None:
        """Take over writes to kept weights, unless the layer has changed."""
        layer, weight = self.layer, self.weight
        if self.dense is None or layer.__dict__["_parameters"].get("weight") is not weight:
            return
        kept = layer.kept
        values = gather_kept(self.dense, kept.starts, kept.columns)
        if not torch.equal(values, weight):
            weight.copy_(values)


def apply_to(layer: nn.Module, fn: Callable[[nn.Module], None]) -> None:
    """fn(layer), which sees a dense weight."""
    mode = DenseInit(layer)
    with mode:
        fn(layer)
    mode.take()
