"""sgd_step and adam_step for the backend "cuda": a step of all Parameters of one device and dtype.

One launch, from the tables of tables.py; see optim/cuda_optim.h. A captured step follows a changed
mask, and Adam's step counts may lie on the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lottery_sparse.ops.common.torch_private import foreach_add_
from lottery_sparse.ops.steps.tables import (
    Table,
    Targets,
    log_of,
    on_device,
    refused,
    table_of,
    tables_by_count,
)

_ops = torch.ops.lottery_sparse_cuda


def sgd_step(
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    effective: list[Tensor],
    starts: list[Tensor],
    columns: list[Tensor],
    owners: list[int],
    lr: float | Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first: bool,
) -> int:
    """A step of torch.optim.SGD.

    Args:
        params, grads: of one device and one of float32, float16 and bfloat16, contiguous.
        momenta: as many, or none for momentum = 0; not read if `first`.
        effective, starts, columns, owners: dense weights, and lists of compact Parameters, each
            with the position of its Parameter. Spare slots are left alone; an effective weight
            without elements is not written.
        lr: a number, or a float32 tensor on the device.

    Returns:
        -1; or, with nothing done, the position of a Parameter that the kernel does not take.
    """
    tensors = (params, grads, momenta) if momentum != 0 else (params, grads)
    targets = Targets(effective, starts, columns, owners)
    position = refused(tensors, [], targets, lr)
    if position >= 0:
        return position
    with torch.cuda.device_of(params[0]):
        table = table_of(tensors, [], targets)
    if table.chunks:
        _ops.sgd_step(
            *_where(table, params[0], lr), momentum, dampening, weight_decay, nesterov, maximize,
            momentum != 0, first,
        )  # fmt: skip
    return -1


def adam_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    effective: list[Tensor],
    starts: list[Tensor],
    columns: list[Tensor],
    owners: list[int],
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    maximize: bool,
) -> int:
    """A step of torch.optim.Adam, or with `decoupled` of AdamW; arguments as in `sgd_step`.

    `steps` count on the host, each before this step; or on the device, where a launch before that
    of the step counts, so that both can be captured. On the host, Parameters that have taken
    another number of steps are another launch.
    """
    tensors = params, grads, exp_avgs, exp_avg_sqs
    targets = Targets(effective, starts, columns, owners)
    position = refused(tensors, steps, targets, lr)
    if position >= 0:
        return position
    rates = beta1, beta2, eps, weight_decay, decoupled, maximize
    if on_device(steps, params):
        with torch.cuda.device_of(params[0]):
            table = table_of(tensors, steps, targets)
        held, rate = _rate(lr)
        factors = _ops.count_steps(
            table.numbers, table.steps, len(steps), held, rate, log_of(beta1), log_of(beta2)
        )
        if table.chunks:
            _ops.adam_step(*_where(table, params[0], lr), factors, 0.0, 0.0, *rates)
        return -1
    if isinstance(lr, Tensor):
        return 0
    with torch.cuda.device_of(params[0]):
        launches = tables_by_count(tensors, steps, targets)
    for table, counted, taken in launches:
        count = taken + 1
        if table.chunks:
            factors = -lr / (1 - beta1**count), math.sqrt(1 - beta2**count)
            _ops.adam_step(*_where(table, params[0], lr), None, *factors, *rates)
        foreach_add_(counted, 1)
    return -1


def _where(table: Table, like: Tensor, lr: float | Tensor) -> tuple:
    """What a launch needs to know of a table, and the learning rate."""
    return table.numbers, like, table.parts, table.targets, table.chunks, *_rate(lr)


def _rate(lr: float | Tensor) -> tuple[Tensor | None, float]:
    return (lr, 0.0) if isinstance(lr, Tensor) else (None, float(lr))
