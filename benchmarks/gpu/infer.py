"""Inference: packed weights of every format and backend, 1 to 4096 rows, against cuBLAS in bf16.

Copies of a weight take turns until they exceed the cache. Cases of one weight follow each other,
so that it is packed once.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import lottery_sparse as ls
from benchmarks.gpu.rows import BANDWIDTH, RATES, Case, Row
from benchmarks.gpu.timing import Device, Skip, Work, timed
from lottery_sparse.ops import dispatch
from lottery_sparse.ops.packed import formats

SHAPES = ((11008, 4096), (28672, 8192))
ROWS = (1, 16, 4, 64, 4096)
DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.5)
BACKENDS = ("cuda", "triton")

Product = Callable[[Tensor], Tensor]  # x -> y


def sparse_weight(d: Device, n: int, k: int, density: float) -> Tensor:
    w = d.randn(n, k)
    return w.mul_(d.mask(n, k, density=density))


# ---- weights: from a dense one to (product, bytes) -----------------------------------------------


def size_of(*tensors: Tensor) -> float:
    return float(sum(t.numel() * t.element_size() for t in tensors))


def dense(w: Tensor) -> tuple[Product, float]:
    return lambda x: F.linear(x, w), size_of(w)


def ternary(w: Tensor) -> tuple[Product, float]:
    codes, scale = formats.pack_ternary(w.sign()), w.new_full((1,), 0.5)
    return lambda x: ls.ops.ternary_linear(x, codes, scale, w.shape[0]), size_of(codes)


def csr(w: Tensor) -> tuple[Product, float]:
    values, starts, columns = formats.pack_csr(w, w != 0)
    held = size_of(values, starts, columns)
    return lambda x: ls.ops.csr_linear(x, values, starts, columns), held


def bitmap(w: Tensor) -> tuple[Product, float]:
    kept = w != 0
    values, starts, bits = w[kept], formats.row_starts(kept), ls.ops.pack_mask(kept)
    held = size_of(values, starts, bits)
    return lambda x: ls.ops.bitmap_linear(x, values, starts, bits), held


def torch_csr(w: Tensor) -> tuple[Product, float]:
    if not w.is_cuda:
        w = w.float()  # a CPU has no bfloat16 products of CSR
    sparse = w.to_sparse_csr()
    parts = sparse.values(), sparse.crow_indices(), sparse.col_indices()
    return lambda x: (sparse @ x.to(w.dtype).T).T, size_of(*parts)


def two_of_four(w: Tensor) -> tuple[Product, float]:
    if not w.is_cuda:
        raise Skip("2:4 semi-structured weights need a GPU")
    pattern = torch.tensor([1, 0, 1, 0], device=w.device, dtype=w.dtype)
    sparse = torch.sparse.to_sparse_semi_structured(w * pattern.repeat(w.shape[1] // 4))
    return lambda x: F.linear(x, sparse), size_of(w) * 9 / 16  # half of the values, 2 bits each


def gemlite(w: Tensor) -> tuple[Product, float]:
    if importlib.util.find_spec("gemlite") is None:
        raise Skip("gemlite cannot be imported")
    helper: Any = importlib.import_module("gemlite.helper")
    layer = helper.A16W158_INT(device=str(w.device), dtype=w.dtype).from_weights(
        w.sign().to(torch.int8), w.new_full((1,), 0.5), None
    )
    return layer, w.numel() / 4


def product(
    make: Callable[[Tensor], tuple[Product, float]],
    backend: str | None,
    shape: tuple[int, int],
    rows: int,
    density: float,
    graph: bool,
    d: Device,
) -> Row:
    if backend is not None and backend not in dispatch.BACKENDS:
        raise Skip(f"there is no backend {backend}")
    if backend is not None and not dispatch.built(backend):
        raise Skip(f"{backend} is not built here")
    n, k = shape

    def weights() -> tuple[list[Product], float]:
        first, held = make(sparse_weight(d, n, k, density))
        rest = [make(sparse_weight(d, n, k, density))[0] for _ in range(d.copies(held) - 1)]
        return [first, *rest], held

    products, held = d.share((make.__name__, shape, density), weights)
    # what a format must hold, whatever this one does
    flops, least = 2.0 * rows * n * k, held + 2.0 * rows * (n + k)

    def work() -> Work:
        x = d.randn(rows, k)

        def run() -> None:
            for one in products:
                one(x)

        predicted = max(least / BANDWIDTH, flops / RATES["bf16"]) * 1e6
        return Work(run, len(products), least, flops, predicted, graph=graph)

    def measure() -> Row:
        with torch.inference_mode():
            return timed(d, work)

    if backend is None:
        return measure()
    with ls.use_backend(backend):
        return measure()


# peer -> (how it is made, density, rows or None = all, whether a graph is captured)
PEERS: dict[str, tuple] = {
    "cuBLAS graphed": (dense, 1.0, None, True),
    "cuBLAS eager": (dense, 1.0, None, False),
    "2:4 cuSPARSELt": (two_of_four, 1.0, None, True),
    "GemLite ternary": (gemlite, 1.0, None, True),
    "torch CSR": (torch_csr, 0.05, (1, 16), True),
    "torch CSR, 50%": (torch_csr, 0.5, (1, 16), True),
}


def cases(dry: bool) -> list[Case]:
    found = []
    for shape in ((64, 128),) if dry else SHAPES:
        some = (1, 16) if dry else ROWS

        def add(name, make, backend, density, rows, peer=False, graph=True, shape=shape) -> None:
            run = partial(product, make, backend, shape, rows, density, graph)
            title = f"{shape[0]}x{shape[1]} M{rows}"
            kept = None if peer and make is not torch_csr else density
            found.append(Case("infer", "product", name, title, run, kept, peer=peer))

        for name, (make, density, only, graph) in PEERS.items():
            for rows in only or some:
                add(name, make, None, density, rows, True, graph)
        for rows in some:
            for backend in BACKENDS:
                add(f"ls ternary {backend}", ternary, backend, 0.5, rows)
        for density in DENSITIES[:2] if dry else DENSITIES:
            for make in (bitmap, csr) if density <= 0.2 else (bitmap,):
                for rows in some:
                    for backend in BACKENDS:
                        add(f"ls {make.__name__} {backend}", make, backend, density, rows)
    return found
