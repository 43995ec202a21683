"""The study: 45 LeNets side by side, one group of ours against eager PyTorch and a graphed vmap."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import prune

import lottery_sparse as ls
from benchmarks.cpu import lenet
from benchmarks.cpu.layers import LENET_NETWORKS
from benchmarks.gpu.rows import Case, Row
from benchmarks.gpu.timing import Device, Work, timed, within

DENSITIES = (0.2, 0.05, 0.5)
SAMPLE = 500  # steps of the eager networks that are timed
STEPS, GROUPS = 50_435, 25  # of a run, and of the study: 1125 networks in groups of 45
WEIGHTS = 784 * 300 + 300 * 100 + 100 * 10


def numbers(d: Device, *networks: int) -> tuple[Tensor, Tensor]:
    return tuple(t.to(d.name) for t in lenet.data(*networks))  # pyright: ignore


def adam(d: Device, parameters: Any, kind: Any = torch.optim.Adam) -> Any:
    fused = {"fused": True} if kind is torch.optim.Adam else {}
    return kind(parameters, lr=lenet.RATE, capturable=not d.dry, **fused)


def with_study(row: Row) -> Row:
    """And what the whole study would take by that step, evaluation left out."""
    if "us" not in row:
        return row
    hours = row["us"] * STEPS * GROUPS / 3.6e9
    return row | {"study_hours_extrapolated": round(hours, 3)}


# ---- contenders ----------------------------------------------------------------------------------


def group(
    d: Device, networks: int, density: float, compact: bool, backend: str | None, kind: Any
) -> Row:
    """One model of all networks, trained through modules and autograd, in a CUDA graph."""

    def work() -> Work:
        model: Any = ls.ensemble.replicate(
            ls.sparsify_(lenet.lenet()), networks, list(range(networks))
        )
        ls.set_masks_(model, lenet.masks_of(model, density))
        model = (ls.compact_(model) if compact else model).to(d.name)
        optimizer = adam(d, model.parameters(), kind)
        x, labels = numbers(d, networks)

        def step() -> None:
            optimizer.zero_grad()
            y = model(x).flatten(0, 1)
            loss = F.cross_entropy(y, labels.flatten(), reduction="sum") / lenet.BATCH
            loss.backward()
            optimizer.step()

        # ideal: weights read for forward and dx, kept ones written with their Adam state
        moved = networks * WEIGHTS * (8 + 32 * (density if compact else 1.0))
        return Work(
            within(backend, step),
            bytes=moved,
            flops=6.0 * lenet.BATCH * networks * WEIGHTS,
            weights=networks * WEIGHTS,
        )

    return with_study(timed(d, work))


def one_after_another(d: Device, networks: int, pruned: bool) -> Row:
    """Eager PyTorch; a sample of steps is timed by a clock, and the rest extrapolated."""
    few = 2 if d.dry else 5  # networks that take turns
    steps = []
    for _ in range(few):
        model = lenet.lenet()
        if pruned:
            for name, mask in lenet.masks_of(model, 0.2).items():
                layer = model[int(name.split(".")[0])]
                prune.custom_from_mask(layer, "weight", mask)
        model = model.to(d.name)
        optimizer = torch.optim.Adam(model.parameters(), lenet.RATE, fused=True)
        steps.append(eager_step(model, optimizer, *numbers(d)))
    sample = few if d.dry else SAMPLE
    for step in steps * (1 if d.dry else 10):
        step()
    if not d.dry:
        torch.cuda.synchronize()
    started = time.perf_counter()
    for i in range(sample):
        steps[i % few]()
    if not d.dry:
        torch.cuda.synchronize()
    each = (time.perf_counter() - started) / sample * 1e6
    if d.dry:
        return {"ok": True, "summary": "called twice"}
    row = {
        "us": round(each * networks, 1),
        "of_one_us": round(each, 2),
        "rounds": sample,
        "mode": "eager",
        "note": f"extrapolated from {sample} steps of {few} networks",
    }
    return with_study(row)


def eager_step(model: Any, optimizer: Any, x: Tensor, labels: Tensor) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()

    return step


def vmapped(d: Device, networks: int) -> Row:
    """torch.func over stacked dense networks with masks, fused Adam, in a CUDA graph."""

    def work() -> Work:
        models = [lenet.lenet().to(d.name) for _ in range(networks)]
        parameters, _ = torch.func.stack_module_state(models)  # pyright: ignore
        together: Any = SimpleNamespace(named_parameters=lambda: parameters.items())
        masks = {n: m.to(d.name) for n, m in lenet.masks_of(together, 0.2).items()}
        optimizer = adam(d, list(parameters.values()))
        base = models[0]

        def loss_of(values: dict, mask: dict, x: Tensor, labels: Tensor) -> Tensor:
            used = {n: v * mask[n] if n in mask else v for n, v in values.items()}
            return F.cross_entropy(torch.func.functional_call(base, (used, {}), (x,)), labels)

        gradients = torch.func.vmap(torch.func.grad(loss_of))
        x, labels = numbers(d, networks)

        def step() -> None:
            plain = {name: value.detach() for name, value in parameters.items()}
            for name, gradient in gradients(plain, masks, x, labels).items():
                parameters[name].grad = gradient
            optimizer.step()

        return Work(
            step,
            bytes=networks * WEIGHTS * 52.0,
            flops=6.0 * lenet.BATCH * networks * WEIGHTS,
            weights=networks * WEIGHTS,
        )

    return with_study(timed(d, work))


def cases(dry: bool) -> list[Case]:
    networks = 3 if dry else LENET_NETWORKS
    shape = f"{networks} LeNets B{lenet.BATCH}"

    def case(name: str, run: Callable, density: float | None = None, peer: bool = False) -> Case:
        return Case("study", "group step", name, shape, run, density, dtype="fp32", peer=peer)

    found = [
        case("vmap graphed", lambda d: vmapped(d, networks), peer=True),
        case("eager", lambda d: one_after_another(d, networks, False), peer=True),
        case("eager prune", lambda d: one_after_another(d, networks, True), peer=True),
    ]
    ours = {
        "ls compact + ls.optim": (True, None, ls.optim.Adam),
        "ls compact + fused Adam": (True, None, torch.optim.Adam),
        "ls masked": (False, None, torch.optim.Adam),
        "ls compact triton": (True, "triton", torch.optim.Adam),
        "ls masked triton": (False, "triton", torch.optim.Adam),
    }
    for density in DENSITIES[:1] if dry else DENSITIES:
        for name, (compact, backend, kind) in ours.items():
            if dry and backend:  # minutes in the interpreter; the gate and train call the kernels
                continue
            run = partial(
                group, networks=networks, density=density, compact=compact, backend=backend,
                kind=kind,
            )  # fmt: skip
            found.append(case(name, run, density))
    return found
