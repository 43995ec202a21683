"""From a Parameter to the layers that hold it, which follow each step of an optimizer.

Once a layer is registered, a hook runs after every step of any torch optimizer. It puts masked
layers to rest and tells compact ones that their Parameter was written. It does not ask the version
counter, as torch's fused optimizers write without raising it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, wraps
from typing import Any
from weakref import WeakSet

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from lottery_sparse.ops.common.torch_private import disable_dynamo


class Layers:
    """Layers by the Parameter that is their `weight`.

    Keys are ids, and each look-up compares: a weak reference to a Parameter would keep torch from
    swapping it (torch.__future__.set_swap_module_params_on_conversion). So a layer that has another
    Parameter by now is passed over.
    """

    def __init__(self) -> None:
        self._by_id: dict[int, WeakSet[Any]] = {}
        self._most = 64  # entries beyond which those without a layer are dropped
        self.count = 0  # of registrations: grows whenever `of` may have more to say

    def add(self, layer: Any) -> None:
        """Make the layer known as a holder of its `weight`."""
        weight = layer._parameters.get("weight")
        if weight is None:  # a computed one, which no optimizer has
            return
        _watch_steps()
        self.count += 1
        found = self._by_id.get(id(weight))
        if found is None:
            found = self._by_id[id(weight)] = WeakSet()
        found.add(layer)
        if len(self._by_id) > self._most:
            living = {id(layer._parameters.get("weight")) for layer in self.all()}
            self._by_id = {key: found for key, found in self._by_id.items() if key in living}
            self._most = 64 + 2 * len(self._by_id)

    def drop(self, layer: Any) -> None:
        """Forget a layer that takes another form: a new Parameter may have the id of an old one."""
        for found in self._by_id.values():
            found.discard(layer)

    def of(self, parameter: Tensor) -> list[Any]:
        """The layers whose `weight` is this Parameter."""
        found = self._by_id.get(id(parameter))
        if found is None:
            return []
        return [layer for layer in found if layer._parameters.get("weight") is parameter]

    def all(self) -> list[Any]:
        """The layers that live in this process."""
        return [
            layer
            for key, found in self._by_id.items()
            for layer in found
            if id(layer._parameters.get("weight")) == key
        ]

    def __len__(self) -> int:
        return len(self._by_id)


masked, compact = Layers(), Layers()


def outside_graph(hook: Callable[[Optimizer], None]) -> Callable[..., None]:
    """A hook on steps that runs as it is where torch.compile compiles the step."""
    disabled: Any = disable_dynamo(hook)

    @wraps(hook)
    def run(optimizer: Optimizer, args: Any = (), kwargs: Any = None) -> None:
        (disabled if "torch._dynamo" in sys.modules else hook)(optimizer)

    return run


@outside_graph
def put_to_rest(optimizer: Optimizer) -> None:
    """Put the masked layers to rest whose weights the optimizer has."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for layer in masked.of(parameter):
                layer._put_back()


@outside_graph
def after_step(optimizer: Optimizer) -> None:
    """Have the layers whose Parameters an optimizer has stepped follow."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for layer in masked.of(parameter):
                layer._put_back()
            for layer in compact.of(parameter):
                layer.weight_changed()


@cache
def _watch_steps() -> None:
    register_optimizer_step_post_hook(after_step)
