"""Training: whole steps with Adam against torch's, memory, convolutions, learned masks, and parts.

Bytes are what a contender moves per weight by design (perf-anchors, section 4), and with them the
prediction: prune 70, re-masking 58, dense 46, ours 4.25 + 34 for each kept share.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import lottery_sparse as ls
from benchmarks.gpu.rows import BANDWIDTH, RATES, Case, Row
from benchmarks.gpu.timing import Device, Skip, Work, tf32, timed, within
from lottery_sparse.ops import dispatch

DENSITIES = (0.05, 0.1, 0.02, 0.5)  # the first one first, at every batch
BATCHES = (256, 60, 512, 4096)
LATE_BATCHES = (60, 4096)  # of the other densities
CONV = (128, 32, 256)  # channels, height and width, batch


def adam(parameters: Any, dry: bool, fused: bool = True, kind: Any = torch.optim.Adam) -> Any:
    options = {"fused": True} if fused else {}
    return kind(parameters, lr=1e-3, capturable=not dry, **options)  # a CPU captures nothing


def autocast(device: Device) -> Any:
    return torch.autocast(device.name, torch.bfloat16, cache_enabled=False)


def step_of(device: Device, layer: Any, update: Callable[[], Any], x: Tensor, dy: Tensor) -> Any:
    """Forward, backward and update of one layer, under autocast."""
    parameters = list(layer.parameters())

    def step() -> None:
        x.grad = None
        for parameter in parameters:
            parameter.grad = None
        with autocast(device):
            y = layer(x)
        y.backward(dy)
        update()

    return step


# ---- one layer: contenders, each from a dense layer and a mask to (layer, update) ----------------


def dense(d: Device, layer: Any, mask: Tensor) -> tuple:
    return layer, adam(layer.parameters(), d.dry).step


def pruned(d: Device, layer: Any, mask: Tensor) -> tuple:
    prune.custom_from_mask(layer, "weight", mask)
    return layer, adam(layer.parameters(), d.dry).step


def remasked(d: Device, layer: Any, mask: Tensor) -> tuple:
    optimizer = adam(layer.parameters(), d.dry)

    @torch.no_grad()
    def update() -> None:
        optimizer.step()
        layer.weight.mul_(mask)

    return layer, update


def remasked_compiled(d: Device, layer: Any, mask: Tensor, mode: str = "default") -> tuple:
    """Adam and the mask in one compiled kernel: torch's own optimizers break the graph."""
    torch._dynamo.reset()
    options: Any = {"backend": "eager"} if d.dry else {"mode": mode}
    weight = layer.weight
    m, v, t = torch.zeros_like(weight), torch.zeros_like(weight), torch.zeros((), device=d.name)

    def adam_and_mask(w: Tensor, g: Tensor) -> None:
        t.add_(1)
        m.lerp_(g, 0.1)
        v.mul_(0.999).addcmul_(g, g, value=0.001)
        rate = 1e-3 * (1 - 0.999**t).sqrt() / (1 - 0.9**t)
        w.sub_(rate * m / (v.sqrt() + 1e-8)).mul_(mask)

    compiled = torch.compile(adam_and_mask, **options)
    return torch.compile(layer, **options), lambda: compiled(weight.detach(), weight.grad)


def masked(d: Device, layer: Any, mask: Tensor) -> tuple:
    layer = ls.set_masks_(ls.sparsify_(layer), {"weight": mask})
    return layer, adam(layer.parameters(), d.dry).step


def compact(d: Device, layer: Any, mask: Tensor, kind: Any = torch.optim.Adam) -> tuple:
    layer = ls.compact_(ls.set_masks_(ls.sparsify_(layer), {"weight": mask}))
    ours = kind is not torch.optim.Adam
    if ours and not d.dry and dispatch.module_of("adam_step", "triton") is None:
        raise Skip("there is no adam_step on CUDA, so ls.optim is torch's")
    return layer, adam(layer.parameters(), d.dry, fused=not ours, kind=kind).step


# contender -> (how it is made, backend that is forced, bytes per weight at a density, is a peer)
PEERS: dict[str, tuple] = {
    "prune + fused Adam": (pruned, None, lambda s: 70.0),
    "re-mask in place": (remasked, None, lambda s: 58.0),
    "re-mask compiled": (remasked_compiled, None, lambda s: 47.0),
    "dense, no mask": (dense, None, lambda s: 46.0),
}
OURS: dict[str, tuple] = {
    "ls compact + ls.optim": (partial(compact, kind=ls.optim.Adam), None, lambda s: 4.25 + 34 * s),
    "ls compact + fused Adam": (compact, None, lambda s: 4.25 + 34 * s),
    "ls masked": (masked, None, lambda s: 42.25),
    "ls compact triton": (compact, "triton", lambda s: 4.25 + 34 * s),
    "ls masked triton": (masked, "triton", lambda s: 42.25),
}


def linear_step(contender: tuple, n: int, k: int, batch: int, density: float, d: Device) -> Row:
    make, backend, bytes_per_weight = contender

    def work() -> Work:
        x, dy = d.randn(batch, k, grad=True), d.randn(batch, n)
        layer = nn.Linear(k, n, bias=False, device=d.name)
        layer, update = make(d, layer, d.mask(n, k, density=density))
        moved, flops = bytes_per_weight(density) * n * k, 6.0 * batch * n * k
        return Work(
            within(backend, step_of(d, layer, update, x, dy)),
            bytes=moved,
            flops=flops,
            predicted_us=(moved / BANDWIDTH + flops / RATES["bf16"]) * 1e6,
            weights=n * k,
            held=4.0 * batch * (n + k),  # x, dx, y, dy
        )

    return timed(d, work)


def linear_cases(dry: bool) -> list[Case]:
    n, k = (64, 64) if dry else (4096, 4096)
    batches, late = ((8,), (8,)) if dry else (BATCHES, LATE_BATCHES)
    found = []

    def add(name: str, contender: tuple, batch: int, density: float, peer: bool) -> None:
        run = partial(linear_step, contender, n, k, batch, density)
        shape = f"{n}x{k} B{batch}"
        place = None if peer else density
        found.append(Case("train", "step", name, shape, run, place, peer=peer))

    for batch in batches:
        for name, contender in (PEERS | OURS).items():
            add(name, contender, batch, DENSITIES[0], name in PEERS)
    autotuned = (
        partial(remasked_compiled, mode="max-autotune-no-cudagraphs"),
        None,
        lambda s: 47.0,
    )
    for density in DENSITIES[1:2] if dry else DENSITIES[1:]:
        for batch in late if density != 0.5 else batches:
            for name, contender in OURS.items():
                add(name, contender, batch, density, False)
    add("re-mask compiled, max-autotune", autotuned, batches[0], DENSITIES[0], True)
    return found


# ---- a convolution -------------------------------------------------------------------------------


def conv_step(contender: tuple, size: tuple, density: float, d: Device) -> Row:
    make, backend, _ = contender
    channels, side, batch = size

    def work() -> Work:
        x, dy = (
            d.randn(batch, channels, side, side).to(memory_format=torch.channels_last) for _ in "xy"
        )
        layer = nn.Conv2d(channels, channels, 3, padding=1, bias=False, device=d.name)
        layer = layer.to(memory_format=torch.channels_last)
        mask = d.mask(channels, channels, 3, 3, density=density)
        layer, update = make(d, layer, mask)
        flops = 6.0 * batch * side * side * channels * channels * 9
        activations = 2.0 * batch * channels * side * side
        return Work(
            within(backend, step_of(d, layer, update, x.requires_grad_(), dy)),
            bytes=6 * activations,  # x, y, dy, x, dy, dx
            flops=flops,
            predicted_us=flops / RATES["bf16"] * 1e6,
        )

    return timed(d, work)


def conv_cases(dry: bool) -> list[Case]:
    size = (4, 6, 2) if dry else CONV
    shape = f"{size[0]}ch {size[1]}x{size[1]} B{size[2]}"
    names = ("dense, no mask", "prune + fused Adam", "ls masked", "ls compact + fused Adam")
    found = []
    for name in (*names, "ls compact + ls.optim", "ls masked triton"):
        run = partial(conv_step, (PEERS | OURS)[name], size, 0.05)
        peer = name in PEERS
        place = None if peer else 0.05
        found.append(Case("train", "conv step", name, shape, run, place, peer=peer))
    return found


# ---- learned masks: SGD with momentum on the scores, float32 and TF32 ----------------------------


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p: Tensor) -> Tensor:
        return torch.bernoulli(p)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def by_torch(d: Device, x: Tensor, score: Tensor, w: Tensor) -> Callable[[], Tensor]:
    return lambda: F.linear(x, w * _Straight.apply(torch.sigmoid(score)))


def by_compiler(d: Device, x: Tensor, score: Tensor, w: Tensor) -> Callable[[], Tensor]:
    torch._dynamo.reset()

    @torch.compile(**({"backend": "eager"} if d.dry else {}))
    def forward() -> Tensor:
        p = torch.sigmoid(score)
        m = (torch.rand_like(p) < p).to(p.dtype)  # what the compiler can fuse
        return F.linear(x, w * (m + p - p.detach()))

    return forward


def by_us(d: Device, x: Tensor, score: Tensor, w: Tensor) -> Callable[[], Tensor]:
    if not hasattr(ls.ops, "supermask_linear"):
        raise Skip("there is no ops.supermask_linear")
    key = torch.tensor([0, 1, 0], device=d.name)

    def forward() -> Tensor:
        key[2:].add_(1)
        return ls.ops.supermask_linear(x, score, w, key)

    return forward


# contender -> (forward, forced backend, bytes per weight of a step)
LEARNED: dict[str, tuple] = {
    "eager": (by_torch, None, 90.0),
    "compiled": (by_compiler, None, 60.0),
    "ls": (by_us, None, 44.0),
    "ls triton": (by_us, "triton", 44.0),
}


def learned_step(contender: tuple, n: int, k: int, batch: int, d: Device) -> Row:
    make, backend, bytes_per_weight = contender

    def work() -> Work:
        x = d.randn(batch, k, dtype=torch.float32, grad=True)
        dy = d.randn(batch, n, dtype=torch.float32)
        score = d.randn(n, k, dtype=torch.float32, grad=True)
        forward = make(d, x, score, d.randn(n, k, dtype=torch.float32))
        optimizer = torch.optim.SGD([score], lr=0.1, momentum=0.9, fused=not d.dry)

        def step() -> None:
            x.grad = score.grad = None
            forward().backward(dy)
            optimizer.step()

        moved, flops = bytes_per_weight * n * k, 6.0 * batch * n * k
        return Work(
            within(backend, step),
            bytes=moved,
            flops=flops,
            predicted_us=(moved / BANDWIDTH + flops / RATES["tf32"]) * 1e6,
            weights=n * k,
            held=8.0 * batch * (n + k),
        )

    with tf32(True):
        return timed(d, work)


def learned_cases(dry: bool) -> list[Case]:
    n, k, batches = (64, 64, (8,)) if dry else (4096, 4096, (256, 60, 512, 4096))
    return [
        Case(
            "train",
            "learned mask step",
            name,
            f"{n}x{k} B{batch}",
            partial(learned_step, contender, n, k, batch),
            dtype="tf32",
            peer=name in ("eager", "compiled"),
        )
        for batch in batches
        for name, contender in LEARNED.items()
    ]


def cases(dry: bool) -> list[Case]:
    return linear_cases(dry) + learned_cases(dry) + conv_cases(dry)
