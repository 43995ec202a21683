"""The step that the Triton kernel of dscore takes itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from supermask_problems import supermask_problem
from test_supermask_sgd import steps

from benchmarks.gpu import gate as gpu_gate
from benchmarks.gpu.timing import Device

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# one row, more than a tile, networks that share x; scores of 32 and of 16 bits
@pytest.mark.parametrize(
    ("shape", "networks"), [((1, 37), None), ((66, 70), None), ((9, 33), 2), ((0, 5), None)]
)
@pytest.mark.parametrize("weight", ["tensor", "sign x constant"])
def test_equals_the_optimizer(shape, networks, weight):
    p = supermask_problem(shape, (5, shape[1]), weight, True, networks, networks is not None)
    p = p.to(DEVICE)
    for a, b in zip(steps(p, True, "triton"), steps(p, False, "triton"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_activations_of_16_bits():
    p = supermask_problem((9, 40), (5, 40), dtype=torch.float16).to(DEVICE)
    for a, b in zip(steps(p, True, "triton"), steps(p, False, "triton"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    p = replace(p, score=p.score.half())
    steps(p, True, "triton")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_of_16_bits_take_the_step_in_float32(dtype):
    """lr is not rounded to the dtype, nor what it is multiplied by."""
    make, at = gpu_gate.small()["supermask_linear_sgd small"][1], (2, 3)  # score, velocity
    args = gpu_gate.cast(make(Device(DEVICE == "cpu")), dtype)
    ours = gpu_gate.results("supermask_linear_sgd", "triton", args)
    exact = gpu_gate.cast(args, torch.float64)
    exact = gpu_gate.results("supermask_linear_sgd", "reference", exact)
    for a, b in zip(ours[-len(at) :], exact[-len(at) :], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=torch.finfo(dtype).eps * 2, atol=0.01)
