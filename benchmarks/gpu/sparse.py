"""Products with the kept weights only, by the backend "cuda", against cuBLAS with all of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.gpu.rows import BANDWIDTH, RATES, Case, Row
from benchmarks.gpu.timing import Device, Skip, Work, tf32, timed
from lottery_sparse.ops import dispatch
from lottery_sparse.ops.compact.arguments import CompactArgs
from lottery_sparse.ops.compact.kept import KeptLists

SHAPES = ((4096, 4096, 60), (4096, 4096, 256), (300, 784, 60))
DENSITIES = (0.05, 0.02, 0.01)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROCESSORS, CLOCK = 132, 1.755e9
SHARED = PROCESSORS * CLOCK * 128  # bytes of shared memory that all read in a second
L2 = 5.5e12  # bytes that all read from the L2 cache in a second


class Layer:
    """Weight, lists and activations of one layer."""

    def __init__(self, d: Device, n: int, k: int, batch: int, density: float, dtype: str):
        def draw(*shape: int) -> torch.Tensor:
            return d.randn(*shape, dtype=DTYPES[dtype])

        mask = d.mask(n, k, density=density)
        self.x, self.dy, self.w = draw(batch, k), draw(batch, n), draw(n, k) * mask
        self.values, self.kept = self.w[mask].contiguous(), KeptLists.of(mask)


def sparse(layer: Layer, forward: bool, dx: bool, dvalues: bool) -> None:
    if not dispatch.built("cuda"):
        raise Skip("lottery_sparse._C_cuda is not built")
    carried = None
    a = CompactArgs(layer.x, layer.values, None, layer.w, layer.kept, zero=True)
    if forward:
        _, carried = dispatch.function("compact_linear", "cuda")(a)
    if dx or dvalues:
        backward = dispatch.function("compact_linear_backward", "cuda")
        backward(a, layer.dy, dx, dvalues, carried)


def dense(layer: Layer, forward: bool, dx: bool, dvalues: bool) -> None:
    with tf32(False):
        if forward:
            torch.mm(layer.x, layer.w.T)
        if dx:
            torch.mm(layer.dy, layer.w)
        if dvalues:
            torch.mm(layer.dy.T, layer.x)


PARTS = {
    "forward, kept only": (True, False, False),
    "dvalues, kept only": (False, False, True),
    "products of a step, kept only": (True, True, True),
}


def row(
    run: Callable, needs: tuple, n: int, k: int, batch: int, density: float, dtype: str, d: Device
) -> Row:
    def work() -> Work:
        width, kept = DTYPES[dtype].itemsize, density * n * k
        layers = [
            Layer(d, n, k, batch, density, dtype) for _ in range(d.copies(float(n * k * width)))
        ]
        products = sum(needs)
        if run is sparse:
            moved = (6.0 + width) * kept + 3.0 * width * batch * (n + k)
            flops = 2.0 * batch * kept
            gathered = kept * batch * width
            chunks = PROCESSORS * max(n, k) * 128.0
            limit = max(gathered / SHARED, min(gathered, chunks) / L2, moved / BANDWIDTH)
        else:
            moved, flops = float(width) * (n * k + batch * (n + k)), 2.0 * batch * n * k
            limit = max(moved / BANDWIDTH, flops / RATES[dtype])

        def call() -> None:
            for layer in layers:
                run(layer, *needs)

        return Work(call, len(layers), products * moved, products * flops, products * limit * 1e6)

    return timed(d, work)


def cases(dry: bool) -> list[Case]:
    shapes = ((64, 64, 8),) if dry else SHAPES
    found = []
    for dtype in DTYPES:
        for n, k, batch in shapes:
            for part, needs in PARTS.items():
                for name, run in (("cuBLAS", dense), ("cuda", sparse)):
                    for density in DENSITIES[:1] if dry or run is dense else DENSITIES:
                        call = partial(row, run, needs, n, k, batch, density, dtype)
                        shape, held = f"{n}x{k} B{batch}", None if run is dense else density
                        peer = run is dense
                        found.append(Case("train", part, name, shape, call, held, dtype, peer))
    return found
