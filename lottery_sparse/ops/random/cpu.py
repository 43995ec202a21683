"""Exact selection, and counter-based randomness."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import lottery_sparse._C  # noqa: F401  # pyright: ignore[reportMissingImports]  # registers the ops

_ops = torch.ops.lottery_sparse_native


def random_words(count: int, seed: int, stream: int, step: int, device: Any = "cpu") -> Tensor:
    return _ops.random_words(count, seed, stream, step).to(device)


def random_signs(count: int, seed: int, stream: int, step: int, device: Any = "cpu") -> Tensor:
    return _ops.random_signs(count, seed, stream, step).to(device)


def random_uniform(count: int, seed: int, stream: int, step: int, device: Any = "cpu") -> Tensor:
    return _ops.random_uniform(count, seed, stream, step).to(device)


def random_normal(
    count: int, seed: int, stream: int, step: int, table: Tensor, device: Any = "cpu"
) -> Tensor:
    return _ops.random_normal(count, seed, stream, step, table).to(device)
