"""The steps of Triton against torch.optim and float64."""

from __future__ import annotations

import pytest
import torch
from optim_problems import CASES, PAIRS, by_kernel, set_grads, states
from torch import nn

import lottery_sparse as ls
from lottery_sparse import compact
from lottery_sparse.compact import KeptLists
from lottery_sparse.kernels import masked_optim, step_tables

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# none, one, around the widths of vectors, chunks with and without a tail
SIZES = [(0,), (1,), (3, 11), (1024,), (2, 600)]
STEPS = 3
ULP = 2.0**-23


def parameters(dtype=torch.float32, sizes=SIZES):
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(size, generator=generator) for size in sizes]
    return [nn.Parameter(t.to(DEVICE, dtype)) for t in drawn]


def train(optimizer, params, steps=STEPS, first=0):
    for step in range(first, first + steps):
        set_grads([twin := nn.Parameter(p.detach().cpu()) for p in params], step)
        generator = torch.Generator().manual_seed(1000 + step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
        optimizer.step()


def assert_close(params, expected, relative=1e-6):
    for p, e in zip(params, expected, strict=True):
        scale = e.detach().abs().double() + 1
        error = (p.detach().double().cpu() - e.detach().double().cpu()).abs() / scale.cpu()
        assert (error <= relative).all(), float(error.max())
