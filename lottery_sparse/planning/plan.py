"""ls.plan: measure every form of every masked layer on this machine, and apply the best."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lottery_sparse
from lottery_sparse import measurements
from lottery_sparse.nn.compact.base import Compact
from lottery_sparse.nn.compact.moving import check_movable
from lottery_sparse.nn.forms.convert import by_parameter, check_masked, masked_modules
from lottery_sparse.nn.forms.verbs import compact_, densify_, pack_, sparsify_
from lottery_sparse.nn.masked import Masked
from lottery_sparse.ops import dispatch
from lottery_sparse.planning.example import call_of, inputs_of
from lottery_sparse.planning.measuring import (
    COMPACT_FORMS,
    FORMS,
    Cost,
    candidates,
    form_of,
    format_of,
    measured,
)
from lottery_sparse.planning.rate import measure_once
from lottery_sparse.planning.table import Plan, Row

# A gain in time below this share counts as none.
_LEAST_GAIN = 0.05
_FILE = "plan.json"
# densities that share a cache entry: thirds of an octave
_BUCKETS_PER_OCTAVE = 3


def plan(
    model: nn.Module,
    *inputs: Any,
    training: bool = True,
    optimizer: torch.optim.Optimizer | None = None,
    apply: bool = True,
    cache: bool = True,
    report: Callable[[str], object] | None = print,
    **kwargs: Any,
) -> Plan:
    """Time every form of every masked layer at the shapes of an example; apply the best.

    Forms in a training (forward and backward):

        masked          the layer as it is
        compact         its products as dispatch chooses them
        sparse product  compact, all products over kept weights
        dense product   compact, all products on the dense library
        dense           measured for comparison, and never applied, since it has no mask

    For inference (forward only) `dense` may be applied, by `ls.densify_`, and so may `packed`, by
    `ls.pack_`. Such layers have no mask any more, and compute the same.

    Rules of the choice:

    - A layer changes its form only for a form that is not slower. A form that holds more memory
      must be a twentieth faster. Of forms that close to the fastest, the smallest is taken.
    - A form whose repetitions do not agree, after three tries, is not taken. A layer whose present
      form is such a form keeps it.
    - Layers that share a weight get one form: the best for all of them that the example reaches.
    - Zeros that a mask keeps are not pruned; the table says which call prunes them. The packed form
      leaves them out by itself.

    >>> optimizer = torch.optim.Adam(model.parameters())
    >>> found = ls.plan(model, x, optimizer=optimizer, report=None)
    >>> print(found)

    Args:
        model: a model with masked or compact layers.
        inputs, kwargs: the arguments of a call, model(*inputs, **kwargs). A single tuple holds all
            positional arguments. A single mapping holds all keyword arguments, if the model's
            forward has such names; else it is an argument like any other. An argument of the model
            with a name of those below goes into such a mapping.
        training: time forward and backward; False: forward only.
        optimizer: of the model, if it exists already: `compact_` gives it the new Parameters.
        apply: give each layer its best form, in place.
        cache: use measurements of this machine, with these versions and threads, at the same shape
            and nearly the same density; write new ones. LS_CACHE_DIR names the folder. Measurements
            older than two weeks are made anew; unreliable ones are not written.
        report: called with the table, once the forms are applied; None = silence.

    Returns:
        The plan; as text it is the table.

    Raises:
        ValueError: the model has no masked layer, the inputs reach none of them or do not fit the
            model, or the optimizer holds state that cannot move.
        TypeError: an input of a layer is no tensor.
    """
    check_masked(model)
    layers = {prefix[:-1] or "(model)": layer for prefix, layer in masked_modules(model)}
    reached = inputs_of(model, layers, *call_of(model, inputs, kwargs))
    if not reached:
        raise ValueError("the inputs reach no masked layer; is the model called differently?")
    costs = {name: _measured(layers[name], x, training, cache) for name, x in reached.items()}
    rows, groups = [], []
    for parameter, group in by_parameter(model):
        names = [name for name in reached if any(layers[name] is layer for layer in group)]
        if not names:
            continue
        present = form_of(group[0])
        choice = _choice([costs[name] for name in names], present, training, len(group) > 1)
        groups.append((parameter, group, present, choice))
        rows += [_row(name, layers[name], reached[name], costs[name], choice) for name in names]
    order = list(reached)
    rows.sort(key=lambda row: order.index(row.name))
    if apply:
        _apply([g for g in groups if g[2] != g[3]], optimizer)
    found = Plan(rows, training, torch.get_num_threads(), apply)
    if cache:
        measure_once()
    if report is not None:
        report(str(found))
    return found


def _row(name: str, layer: Masked, x: Tensor, costs: dict[str, Cost], choice: str) -> Row:
    return Row(
        name,
        _kind(layer),
        tuple(x.shape),
        layer.density,
        _nonzero(layer, layer.weight_mask),
        costs,
        form_of(layer),
        choice,
    )


def _choice(costs: list[dict[str, Cost]], present: str, training: bool, tied: bool) -> str:
    """The form for layers that share a weight, from the costs of each; see `plan`."""
    # a dense layer has no mask; tied packed layers would hold the weight once each
    barred = {"dense"} if training else {"packed"} if tied else set()
    names = [
        name
        for name in costs[0]
        if name not in barred and all(name in cost and cost[name].reliable for cost in costs)
    ]
    if present not in names:
        return present
    ms = {name: sum(cost[name].ms for cost in costs) for name in names}
    size = {name: sum(cost[name].bytes for cost in costs) for name in names}
    fit = [
        name
        for name in names
        if ms[name] <= ms[present]
        and (size[name] <= size[present] or ms[name] <= (1 - _LEAST_GAIN) * ms[present])
    ]
    fastest = min(ms[name] for name in fit)
    near = [name for name in fit if (1 - _LEAST_GAIN) * ms[name] <= fastest]
    return min(near, key=lambda name: (size[name], name != present, FORMS.index(name)))


def _apply(
    groups: list[tuple[str, list[Masked], str, str]], optimizer: torch.optim.Optimizer | None
) -> None:
    """Give each group of layers that share a weight its form."""
    if optimizer is not None:
        for name, group, _, _ in groups:  # all of it before the first write
            check_movable(name, group[0].weight, optimizer)
    for _, group, _, choice in groups:
        together = nn.ModuleList(group)  # at once, so that they go on sharing their weight
        if choice == "packed":
            pack_(together, report=None)
        elif choice == "dense":
            densify_(together, optimizer)
        elif choice == "masked":
            sparsify_(together, optimizer=optimizer)
        else:
            compact_(together, optimizer)
            [products] = [p for p, name in COMPACT_FORMS.items() if name == choice]
            for layer in group:
                assert isinstance(layer, Compact)
                layer.products = products


# ---- measuring, or what was measured before ------------------------------------------------------


def _measured(layer: Masked, x: Tensor, training: bool, cache: bool) -> dict[str, Cost]:
    """The cost of each form: times measured now or before, and its memory."""
    key, forms = _key(layer, x, training), candidates(layer, training)
    before = _kept(key) if cache else None
    if before is not None and before.keys() != forms.keys():
        before = None
    found = measured(forms, x, training, before)
    if cache and before is None and all(cost.reliable for cost in found.values()):
        _keep(key, found)
    return found


def _nonzero(layer: Masked, kept: Tensor | None = None) -> float:
    """Share of the weights that are not zero, and kept if a mask is given."""
    weight = layer.effective_weight.detach()
    found = weight != 0 if kept is None else (weight != 0) & kept
    return int(found.count_nonzero()) / weight.numel() if weight.numel() else 1.0


def _kind(layer: Masked) -> str:
    shape = layer.weight_mask.shape[-layer.rank :]
    if layer.rank == 2:
        return f"Linear {shape[1]} -> {shape[0]}"
    return f"Conv2d {shape[2]}x{shape[3]}, {shape[1]} -> {shape[0]}"


# ---- what was measured before --------------------------------------------------------------------


def _key(layer: Masked, x: Tensor, training: bool) -> str:
    """A text of everything that a time depends on, except the exact density."""
    parts = {
        "machine": platform.node() + " " + measurements.processor(),
        "threads": torch.get_num_threads(),
        "backend": [os.environ.get("LS_CPU", ""), dispatch.built("cpu"), dispatch.forced()],
        "libraries": measurements.held(),
        "precision": [torch.get_float32_matmul_precision(), _autocast(x.device.type)],
        "type": _type(layer),
        "layer": _kind(layer),
        "rest": [getattr(layer, n, None) for n in ("stride", "padding", "dilation", "groups")],
        "bias": layer.bias is not None,
        "zero": layer.weight_frozen is None,
        "networks": layer.weight_mask.dim() - layer.rank and layer.weight_mask.shape[0],
        "input": list(x.shape),
        "channels_last": x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last),
        "dtype": [str(x.dtype), str(layer.weight.dtype)],
        "device": str(x.device),
        "density": _octaves(layer.density),
        "packed": [format_of(layer, training), None if training else _octaves(_nonzero(layer))],
        "training": training,
    }
    return json.dumps(parts, sort_keys=True)


def _octaves(share: float) -> int | str:
    return round(_BUCKETS_PER_OCTAVE * math.log2(share)) if share else "empty"


def _autocast(device: str) -> str:
    on = torch.is_autocast_enabled(device)
    return str(torch.get_autocast_dtype(device)) if on else ""


def _type(layer: Masked) -> str:
    """The name of the layer's type in the masked form."""
    kind = layer.masked_type if isinstance(layer, Compact) else type(layer)
    return f"{kind.__module__}.{kind.__qualname__}"


def cache_path() -> Path:
    """The file with earlier measurements, see `measurements.path_of`."""
    return measurements.path_of(_FILE)


def _keep(key: str, paths: dict[str, Cost]) -> None:
    measurements.put(
        _FILE,
        key,
        lottery_sparse=lottery_sparse.__version__,
        threads=torch.get_num_threads(),
        paths={name: asdict(path) for name, path in paths.items()},
    )


def _kept(key: str) -> dict[str, Cost] | None:
    """The costs of an entry that is whole, of these versions, and young enough; else None."""
    number = measurements.number
    entry = measurements.get(_FILE, key, lottery_sparse=lottery_sparse.__version__)
    if entry is None:
        return None
    try:
        found = {
            name: Cost(number(cost["ms"]), int(number(cost["bytes"])), number(cost["spread"]))
            for name, cost in entry["paths"].items()
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    return found if all(cost.ms > 0 for cost in found.values()) else None
