"""Inference with a packed weight, y = x Wᵀ, for few rows of x.

    F.linear fp32, bf16    dense
    torch int8, int4       torch's own weight-only kernels, bf16 x: what torchao compiles to
    torchao int8           torchao's Int8WeightOnlyConfig in eager mode, bf16 x
    ls ternary int8        two bits a weight, x rounded to int8 by row
    ls ternary             two bits a weight, fp32 x, exact
    ls csr, ls bitmap      kept weights in fp32, by columns or by mask bits
    ls bitmap bf16         … in bf16

A small weight stays in the cache between rounds, as it would not in a large model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lottery_sparse as ls
from benchmarks.cpu import peers, steps
from benchmarks.cpu.layers import PACKED_BATCHES, PACKED_LAYERS, QUICK_PACKED_BATCHES
from lottery_sparse import ops
from lottery_sparse.ops.packed import formats

# contender -> kept shares
DENSITIES = {
    "F.linear fp32": (1.0,),
    "F.linear bf16": (1.0,),
    "torch int8": (1.0,),
    "torch int4": (1.0,),
    "torchao int8": (1.0,),
    "ls ternary int8": (0.5,),
    "ls ternary": (0.5,),
    "ls csr": (0.2, 0.1, 0.05),
    "ls bitmap": (0.5, 0.2, 0.1, 0.05),
    "ls bitmap bf16": (0.5, 0.2, 0.1, 0.05),
}
QUICK_DENSITIES = (1.0, 0.5, 0.1)


class Case(NamedTuple):
    layer: str
    batch: int
    density: float
    contender: str


def cases(quick: bool) -> list[Case]:
    return [
        Case(layer, batch, density, contender)
        for layer in list(PACKED_LAYERS)[: 1 if quick else None]
        for contender, densities in DENSITIES.items()
        for density in densities
        if not quick or density in QUICK_DENSITIES
        for batch in (QUICK_PACKED_BATCHES if quick else PACKED_BATCHES)
    ]


def _weight(layer: str, density: float, dtype: torch.dtype = torch.float32) -> Tensor:
    k, n = PACKED_LAYERS[layer]
    weight = torch.randn(n, k)
    return (weight * (torch.rand(n, k) < density) if density < 1 else weight).to(dtype)


def dense(layer: str, density: float, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    weight = _weight(layer, density, dtype)
    return lambda x: F.linear(x, weight)


def torch_int8(layer: str, density: float) -> Callable[[Tensor], Tensor]:
    k, n = PACKED_LAYERS[layer]
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    scale = torch.ones(n, dtype=torch.bfloat16)
    return lambda x: torch.ops.aten._weight_int8pack_mm(x, weight, scale)


def torch_int4(layer: str, density: float) -> Callable[[Tensor], Tensor]:
    group = 128
    k, n = PACKED_LAYERS[layer]
    codes = torch.randint(0, 16, (n, k), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scale_zero = torch.ones(k // group, n, 2, dtype=torch.bfloat16)
    run = torch.ops.aten._weight_int4pack_mm_for_cpu
    return lambda x: run(x, packed, group, scale_zero)


def torchao_int8(layer: str, density: float) -> Callable[[Tensor], Tensor]:
    try:
        quantization = peers.module("torchao.quantization")
    except peers.Unusable as reason:
        pytest.skip(str(reason))
    k, n = PACKED_LAYERS[layer]
    model = nn.Sequential(nn.Linear(k, n, bias=False, dtype=torch.bfloat16))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return lambda x: model(x)


def ternary(layer: str, density: float, activations: str) -> Callable[[Tensor], Tensor]:
    codes = formats.pack_ternary(_weight(layer, density).sign())
    rows, scale = PACKED_LAYERS[layer].out_features, torch.tensor([0.05])
    return lambda x: ops.ternary_linear(x, codes, scale, rows, None, activations)


def csr(layer: str, density: float) -> Callable[[Tensor], Tensor]:
    weight = _weight(layer, density)
    packed = formats.pack_csr(weight, weight != 0)
    return lambda x: ops.csr_linear(x, *packed)


def bitmap(layer: str, density: float, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    weight = _weight(layer, density)
    kept = weight != 0
    values, starts = weight[kept].to(dtype), formats.row_starts(kept)
    bits = ls.ops.pack_mask(kept)
    return lambda x: ops.bitmap_linear(x, values, starts, bits)


@lru_cache(maxsize=1)  # cases of one weight follow each other
def packed(contender: str, layer: str, density: float) -> Callable[[Tensor], Tensor]:
    torch.manual_seed(0)
    return PACKED[contender](layer, density)


PACKED = {
    "F.linear fp32": partial(dense, dtype=torch.float32),
    "F.linear bf16": partial(dense, dtype=torch.bfloat16),
    "torch int8": torch_int8,
    "torch int4": torch_int4,
    "torchao int8": torchao_int8,
    "ls ternary int8": partial(ternary, activations="int8"),
    "ls ternary": partial(ternary, activations="exact"),
    "ls csr": csr,
    "ls bitmap": partial(bitmap, dtype=torch.float32),
    "ls bitmap bf16": partial(bitmap, dtype=torch.bfloat16),
}


def bench_packed_linear(benchmark, quick, case):
    layer = packed(case.contender, case.layer, case.density)
    x = torch.randn(case.batch, PACKED_LAYERS[case.layer].in_features)
    if "bf16" in case.contender or case.contender.startswith("torch"):
        x = x.bfloat16()
    benchmark.extra_info.update(case._asdict())
    benchmark.group = f"{case.layer}, M = {case.batch}"
    with torch.inference_mode():
        steps.measure(benchmark, lambda: layer(x), quick)
