"""Time and memory of each form of one layer on this machine."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lottery_sparse.nn.compact.base import Compact
from lottery_sparse.nn.forms.compacting import expand_layers_
from lottery_sparse.nn.forms.densify import settle_bias
from lottery_sparse.nn.forms.verbs import compact_, densify_, pack_
from lottery_sparse.nn.masked import Masked
from lottery_sparse.nn.packed import choose_format
from lottery_sparse.ops.common.eager import has_node

# A try has 5 rounds. A round times one form after another; all rounds of a form take 0.03 s.
_ROUNDS = 5
_SECONDS = 0.03
_TRIES = 3
# A step longer than this, in seconds, runs once a round. Others run twice at least: the first run
# finds the cache full of another form's weights.
_LONG = 0.1
# Repetitions agree if the third best round is at most a tenth slower than the best one.
_AGREEING = 3
_MOST_SPREAD = 0.1

# `products` of a compact layer -> the name of the form
COMPACT_FORMS = {"auto": "compact", "sparse": "sparse product", "dense": "dense product"}
FORMS = ("dense", "masked", *COMPACT_FORMS.values(), "packed")  # in the order of a table


@dataclass(frozen=True)
class Cost:
    """One form of a layer.

    Attributes:
        ms: the best time of all rounds.
        bytes: of all Parameters, buffers, lists and dense weights that the layer holds. Gradients
            and optimizer state come on top, each as large as the Parameters.
        spread: the third best round over the best round, less 1.
    """

    ms: float
    bytes: int
    spread: float = 0.0

    @property
    def reliable(self) -> bool:
        """Whether repetitions agree."""
        return self.spread <= _MOST_SPREAD


class Candidate(NamedTuple):
    """A copy of a layer in one form; `products` says how a compact copy multiplies."""

    module: nn.Module
    products: str | None = None

    def take(self) -> None:
        """Set the copy, which all compact forms share, to the products of this form."""
        if self.products is not None:
            vars(self.module)["products"] = self.products  # past nn.Module's setter, which is timed


def form_of(layer: Masked) -> str:
    """The form that a layer has now."""
    if not isinstance(layer, Compact):
        return "masked"
    return COMPACT_FORMS[layer.products if _chooses(layer) else "auto"]


def _chooses(layer: Masked) -> bool:
    """Whether a compact layer follows its `products`."""
    return layer.rank == 2 and has_node()


def candidates(layer: Masked, training: bool) -> dict[str, Candidate]:
    """Copies of the layer in every form that it can have; "dense" is there to compare with."""
    plain = copy.deepcopy(layer)
    settle_bias(plain)
    for hooks in (
        plain._forward_hooks, plain._forward_pre_hooks, plain._backward_hooks,
        plain._backward_pre_hooks,
    ):  # fmt: skip
        hooks.clear()  # the user's hooks are not what is measured
    expand_layers_(plain)
    found = {"masked": Candidate(plain)}
    dense = _made(densify_, plain)
    if dense is not None:
        found["dense"] = Candidate(dense)
    compact = _made(compact_, plain)
    if compact is not None:
        for products in ("sparse", "auto", "dense"):  # "dense" last, as it may make a dense weight
            if products == "auto" or _chooses(layer):
                found[COMPACT_FORMS[products]] = Candidate(compact, products)
    if format_of(layer, training) != "dense":
        packed = _made(lambda module: pack_(module, report=None), plain)
        if packed is not None:
            found["packed"] = Candidate(packed)
    return found


def format_of(layer: Masked, training: bool) -> str:
    """The format that `pack_` would take; "dense" too where it has none, as for convolutions."""
    if training or not layer.weight_mask.dim() == layer.rank == 2:
        return "dense"
    return choose_format(layer.effective_weight.detach())


def _made(form: Callable[[nn.Module], nn.Module], plain: nn.Module) -> nn.Module | None:
    """A copy in another form; None if the layer cannot have it."""
    try:
        return form(copy.deepcopy(plain))
    except (TypeError, ValueError):  # a subclass, a computed weight, too many weights for lists
        return None


def measured(
    forms: dict[str, Candidate], x: Tensor, training: bool, before: dict[str, Cost] | None = None
) -> dict[str, Cost]:
    """Time and memory of each form; up to three tries, until repetitions agree.

    Args:
        before: times of the same forms that were measured before, which are taken as they are.
    """
    steps, sizes = {}, {}
    for name, form in forms.items():
        steps[name] = _step(form, x, training)
        steps[name]()  # warms up; the layer then holds all that it holds in use
        sizes[name] = bytes_of(form.module)
    if before is not None:
        return {name: replace(cost, bytes=sizes[name]) for name, cost in before.items()}
    found: dict[str, Cost] = {}
    rounds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(_TRIES):
        for name, times in _rounds(steps).items():
            rounds[name] = sorted(rounds[name] + times)
            best, close = rounds[name][0], rounds[name][_AGREEING - 1]
            found[name] = Cost(best * 1e3, sizes[name], close / best - 1)
        if all(cost.reliable for cost in found.values()):
            break
    return found


def _rounds(steps: dict[str, Callable[[], None]]) -> dict[str, list[float]]:
    """Seconds of each form's best run in every round."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(_ROUNDS):
        for name, step in steps.items():
            found[name].append(_best(step))
    return found


def _best(step: Callable[[], None]) -> float:
    times: list[float] = []
    least, end = 2, time.perf_counter() + _SECONDS / _ROUNDS
    while len(times) < least or time.perf_counter() < end:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
        least = 1 if times[0] > _LONG else 2
    return min(times)


def _step(form: Candidate, x: Tensor, training: bool) -> Callable[[], None]:
    """Forward, and backward in training, of one form."""
    module = form.module
    x = x.detach().clone().requires_grad_(training and x.is_floating_point())
    autocasts = torch.is_autocast_enabled(x.device.type)
    form.take()
    with torch.set_grad_enabled(training):
        dy = torch.ones_like(module(x))

    def step() -> None:
        form.take()
        with torch.set_grad_enabled(training):
            if autocasts:
                torch.clear_autocast_cache()  # weights move between steps, and are converted anew
            y = module(x)
            if training:
                x.grad = None
                module.zero_grad(set_to_none=True)
                y.backward(dy)
        if x.is_cuda:
            torch.cuda.synchronize()

    return step


def bytes_of(module: nn.Module) -> int:
    """Bytes of all that a layer holds, each tensor once."""
    held = [*module.parameters(), *module.buffers()]
    held += [t for m in module.modules() if isinstance(m, Compact) for t in m.derived()]
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in held}.values())
