"""The launches of sgd_step and adam_step for the backend "cuda": csrc/optim/cuda_optim.h."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lottery_sparse.ops.steps import launches
from lottery_sparse.ops.steps.launches import AdamOptions, SgdOptions, rate_of
from lottery_sparse.ops.steps.tables import Table, log_of

_ops = torch.ops.lottery_sparse_cuda


def _sgd(table: Table, like: Tensor, states: int, o: SgdOptions) -> None:
    _ops.sgd_step(
        *_where(table, like), *rate_of(o.lr), o.momentum, o.dampening, o.weight_decay, o.nesterov,
        o.maximize, states > 0, o.first,
    )  # fmt: skip


def _adam(table: Table, like: Tensor, steps: list[Tensor], count: float, o: AdamOptions) -> None:
    rate, factors, numbers = rate_of(o.lr), None, (0.0, 0.0)
    if steps:
        logs = log_of(o.beta1), log_of(o.beta2)
        factors = _ops.count_steps(table.numbers, table.steps, len(steps), *rate, *logs)
    else:
        numbers = o.factors(count)
    if table.chunks:
        _, *rates = o
        _ops.adam_step(*_where(table, like), *rate, factors, *numbers, *rates)


def _where(table: Table, like: Tensor) -> tuple:
    """What a launch needs to know of a table."""
    return table.numbers, like, table.parts, table.targets, table.chunks


sgd_step, adam_step = partial(launches.sgd_step, _sgd), partial(launches.adam_step, _adam)
