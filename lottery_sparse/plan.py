"""ls.plan: measure every path of every masked layer on this machine, say which wins, apply it."""

from __future__ import annotations

import copy
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lottery_sparse import backends
from lottery_sparse.compact_base import Compact
from lottery_sparse.compacting import compact_, expand_
from lottery_sparse.convert import by_parameter, check_masked, masked_modules
from lottery_sparse.densify import densify_, settle_bias
from lottery_sparse.files import write_whole
from lottery_sparse.modules import Masked
from lottery_sparse.ops.compact import has_node
from lottery_sparse.pack import pack_

# a layer is timed for at least this long, and this often
_SECONDS = 0.03
_LEAST_RUNS = 5
# densities that share a cache entry: thirds of an octave
_BUCKETS_PER_OCTAVE = 3


@dataclass(frozen=True)
class Cost:
    """One way to compute a layer: its time, and the bytes of weights, masks and lists it holds."""

    ms: float
    bytes: int


@dataclass(frozen=True)
class Row:
    """A layer, what was measured, and what is best."""

    name: str
    kind: str  # "Linear 784 -> 300"
    shape: tuple[int, ...]  # of its input
    density: float
    paths: dict[str, Cost]
    choice: str

    @property
    def ratio(self) -> float:
        """Time of the dense layer over that of the choice: above 1 is faster than dense."""
        return self.paths["dense"].ms / self.paths[self.choice].ms

    @property
    def verdict(self) -> str:
        others = {n: p.ms for n, p in self.paths.items() if n not in ("dense", "dense product")}
        best = min(others, key=others.__getitem__)
        if self.choice in others:
            return f"{self.choice}: {self.ratio:.2f}x dense"
        slower = others[best] / self.paths[self.choice].ms
        return f"stays dense: {best} would be {slower:.2f}x slower"


@dataclass(frozen=True)
class Plan:
    """What `plan` found; `print` shows it as a table."""

    rows: list[Row]
    training: bool
    threads: int

    def __str__(self) -> str:
        names = list(dict.fromkeys(name for row in self.rows for name in row.paths))
        head = ["layer", "what", "input", "density", *(f"{n} ms / kB" for n in names), "choice"]
        lines = [head]
        for row in self.rows:
            cells = [
                f"{p.ms:.3f} / {p.bytes / 1e3:.0f}" if (p := row.paths.get(n)) else "-"
                for n in names
            ]
            size = "x".join(map(str, row.shape))
            lines.append([row.name, row.kind, size, f"{row.density:.4g}", *cells, row.verdict])
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        what = "a training step" if self.training else "inference"
        return "\n".join(
            [f"{what} of each layer, {self.threads} thread(s)"]
            + ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines]
        )


def plan(
    model: nn.Module,
    example_inputs: Any,
    *,
    training: bool = True,
    optimizer: torch.optim.Optimizer | None = None,
    apply: bool = True,
    cache: bool = True,
) -> Plan:
    """Time the paths of every masked layer at the shapes of an example; print and apply the best.

    Paths of a training step (forward and backward): the dense layer without a mask, the masked
    layer, the compact layer on sparse kernels, and the compact layer on the dense library ("dense
    product"). "dense" is the yardstick and cannot be applied, as it has no mask. For inference the
    same, forward only, and the packed layer of `ls.pack_` for linear ones, which cannot train.
    Layers that share a weight get one choice, the best for all of them that the example reaches.

    Args:
        model: a model with masked or compact layers.
        example_inputs: what the model is called with: a tensor, or a tuple of arguments.
        training: time forward and backward; False: forward only.
        optimizer: of the model, if it exists already: `compact_` gives it the new Parameters.
        apply: make each layer what was best for it, in place.
        cache: read and write what was measured before on this machine, with these versions and
            threads, at the same shape and nearly the same density (LS_CACHE_DIR says where).

    Returns:
        the plan, which has been printed.

    Raises:
        ValueError: the model has no masked layer, or the example reaches none of them.
    """
    check_masked(model)
    layers = {prefix[:-1] or "(model)": layer for prefix, layer in masked_modules(model)}
    inputs = _inputs_of(model, layers, example_inputs)
    if not inputs:
        raise ValueError("example_inputs reach no masked layer; is the model called differently?")
    store = _Store() if cache else None
    rows = []
    groups = [layers for _, layers in by_parameter(model)]
    costs = {name: _measured(layers[name], x, training, store) for name, x in inputs.items()}
    for name, x in inputs.items():
        layer = layers[name]
        [group] = [group for group in groups if layer in group]
        choice = _choice([costs[n] for n in inputs if layers[n] in group], len(group) > 1)
        rows.append(Row(name, _kind(layer), tuple(x.shape), layer.density, costs[name], choice))
    found = Plan(rows, training, torch.get_num_threads())
    print(found)
    if apply:
        for row in rows:
            [group] = [group for group in groups if layers[row.name] in group]
            _apply(group, row.choice, optimizer)
    return found


def _choice(costs: list[dict[str, Cost]], tied: bool) -> str:
    """The path with the least time over all layers of a shared weight."""
    paths = {n: sum(cost[n].ms for cost in costs) for n in costs[0] if n != "dense"}
    if tied:
        paths.pop("packed", None)  # which would hold the weight once per layer
    return min(paths, key=paths.__getitem__)


def _apply(group: list[Masked], choice: str, optimizer: torch.optim.Optimizer | None) -> None:
    if choice == "packed":
        [layer] = group
        pack_(layer, report=None)
        return
    together = nn.ModuleList(group)  # at once, so that they go on sharing their weight
    if choice == "masked":
        expand_(together, optimizer)
        return
    compact_(together, optimizer)
    for layer in group:
        assert isinstance(layer, Compact)
        layer.products = "dense" if choice == "dense product" else "sparse"


def _inputs_of(
    model: nn.Module, layers: dict[str, Masked], example_inputs: Any
) -> dict[str, Tensor]:
    """The first input that each layer gets when the model runs on the example."""
    seen: dict[str, Tensor] = {}

    def look(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            x = (*args, *kwargs.values())[0]
            if not isinstance(x, Tensor):
                raise TypeError(
                    f"example_inputs brings a {type(x).__name__} to {name}, which needs a tensor; "
                    "give a tensor, or a tuple of the model's arguments."
                )
            seen.setdefault(name, x.detach())

        return hook

    hooks = [
        layer.register_forward_pre_hook(look(name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    were_training = [(module, module.training) for module in model.modules()]
    args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    try:
        model.eval()
        with torch.no_grad():
            model(*args)
    finally:
        for module, was_training in were_training:  # some may be in eval() on purpose
            module.training = was_training
        for hook in hooks:
            hook.remove()
    return seen


# ---- measuring -----------------------------------------------------------------------------------


def _measured(layer: Masked, x: Tensor, training: bool, store: _Store | None) -> dict[str, Cost]:
    key = _key(layer, x, training)
    found = store.get(key) if store else None
    if found is None:
        found = {
            name: Cost(_milliseconds(module, x, training), _bytes(module))
            for name, module in _candidates(layer, training).items()
        }
        if store:
            store.put(key, found)
    return found


def _candidates(layer: Masked, training: bool) -> dict[str, nn.Module]:
    """Copies of the layer, one per path."""
    plain = copy.deepcopy(layer)
    settle_bias(plain)
    for hooks in (
        plain._forward_hooks, plain._forward_pre_hooks, plain._backward_hooks,
        plain._backward_pre_hooks,
    ):  # fmt: skip
        hooks.clear()  # the user's hooks are not what is measured
    expand_(plain)
    found = {"dense": densify_(copy.deepcopy(plain)), "masked": plain}
    compact = compact_(copy.deepcopy(plain))
    found["compact"] = compact
    if layer.rank == 2 and has_node():  # where a layer can say which products it wants
        by_dense = copy.deepcopy(compact)
        assert isinstance(compact, Compact)
        assert isinstance(by_dense, Compact)
        compact.products, by_dense.products = "sparse", "dense"
        found["dense product"] = by_dense
    if not training and layer.weight_mask.dim() == layer.rank == 2:
        found["packed"] = pack_(copy.deepcopy(plain), report=None)
    return found


def _milliseconds(module: nn.Module, x: Tensor, training: bool) -> float:
    """The least of many runs."""
    x = x.clone().requires_grad_(training and x.is_floating_point())
    with torch.set_grad_enabled(training):
        dy = torch.ones_like(module(x))

        def step() -> None:
            y = module(x)
            if training:
                x.grad = None
                module.zero_grad(set_to_none=True)
                y.backward(dy)
            if x.is_cuda:
                torch.cuda.synchronize()

        step()
        times: list[float] = []
        end = time.perf_counter() + _SECONDS
        while len(times) < _LEAST_RUNS or time.perf_counter() < end:
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
    return min(times) * 1e3


def _bytes(module: nn.Module) -> int:
    held = [*module.parameters(), *module.buffers()]
    held += [t for m in module.modules() if isinstance(m, Compact) for t in m.derived()]
    return sum(t.numel() * t.element_size() for t in held)


def _kind(layer: Masked) -> str:
    shape = layer.weight_mask.shape[-layer.rank :]
    if layer.rank == 2:
        return f"Linear {shape[1]} -> {shape[0]}"
    return f"Conv2d {shape[2]}x{shape[3]}, {shape[1]} -> {shape[0]}"


# ---- what was measured before --------------------------------------------------------------------


def _key(layer: Masked, x: Tensor, training: bool) -> str:
    """Everything that a time depends on, but the exact density."""
    density = layer.density
    octaves = round(_BUCKETS_PER_OCTAVE * _log2(density)) if density else "empty"
    parts = {
        "machine": platform.node() + " " + _processor(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "kernels": backends.built("cpu"),
        "cpu": os.environ.get("LS_CPU", ""),
        "layer": _kind(layer),
        "rest": [getattr(layer, n, None) for n in ("stride", "padding", "dilation", "groups")],
        "bias": layer.bias is not None,
        "zero": layer.weight_frozen is None,
        "networks": layer.weight_mask.dim() - layer.rank and layer.weight_mask.shape[0],
        "input": list(x.shape),
        "channels_last": x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last),
        "dtype": str(x.dtype),
        "device": str(x.device),
        "density": octaves,
        "training": training,
    }
    return json.dumps(parts, sort_keys=True)


def _log2(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float64).log2())


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line[:10] == "model name"), "")


def cache_path() -> Path:
    """The file with earlier measurements: in LS_CACHE_DIR, else in the user's cache folder."""
    folder = os.environ.get("LS_CACHE_DIR")
    if folder:
        return Path(folder) / "plan.json"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "lottery_sparse" / "plan.json"


class _Store:
    """Measurements by key in one JSON file; a file that cannot be read counts as empty."""

    def __init__(self) -> None:
        self.path = cache_path()

    def _read(self) -> dict[str, Any]:
        try:
            entries = json.loads(self.path.read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return entries if isinstance(entries, dict) else {}

    def get(self, key: str) -> dict[str, Cost] | None:
        try:
            return {name: Cost(**fields) for name, fields in self._read()[key].items()}
        except (KeyError, TypeError, AttributeError):
            return None

    def put(self, key: str, paths: dict[str, Cost]) -> None:
        entries = self._read() | {key: {name: asdict(path) for name, path in paths.items()}}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, json.dumps(entries, indent=1, sort_keys=True).encode())
        except OSError:
            pass  # a cache that cannot be written costs time, nothing else
