"""The C++ kernels of the optimizers' steps: -1, or the position of a Parameter that they refuse."""

from __future__ import annotations

import torch

import lottery_sparse._C  # noqa: F401  # pyright: ignore[reportMissingImports]  # registers the ops

sgd_step = torch.ops.lottery_sparse_native.sgd_step.default
adam_step = torch.ops.lottery_sparse_native.adam_step.default
