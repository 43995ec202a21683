"""sgd_step and adam_step: a step of all Parameters of one device and dtype in one launch.

A program updates a chunk of one Parameter and writes the new values into the dense effective
weights that hold them. Where they lie is in a table on the device, see `step_tables`, which is made
anew when one has moved. What a mask keeps is read from the lists as the step runs, so a captured
step follows a changed mask.
"""
# pyright: reportArgumentType=false
# ... since a launch takes plain numbers for constexpr

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from lottery_sparse.ops.common.torch_private import foreach_add_
from lottery_sparse.ops.steps.tables import (
    CHUNK,
    Table,
    Targets,
    log_of,
    on_device,
    refused,
    table_of,
    tables_by_count,
)
from lottery_sparse.ops.steps.triton_kernels import adam, count_steps, sgd


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
            held = isinstance(lr, Tensor)
            sgd[(table.chunks,)](
                table.numbers, params[0], lr if held else params[0], table.parts, table.targets,
                0.0 if held else float(lr), float(momentum), 1.0 - dampening, float(weight_decay),
                CHUNK=CHUNK, STATES=len(tensors) - 2, FIRST=first, NESTEROV=nesterov,
                MAXIMIZE=maximize, DECAY=weight_decay != 0, HELD=held, TARGETS=table.has_targets,
            )  # fmt: skip
    return -1


def prepare_step(
    params: list[Tensor],
    grads: list[Tensor],
    states: tuple[list[Tensor], ...],
    effective: list[Tensor],
    starts: list[Tensor],
    columns: list[Tensor],
    owners: list[int],
) -> None:
    """Makes the table of a step, all it takes memory for; for several steps that go together."""
    if params[0].is_cuda and torch.cuda.is_current_stream_capturing():
        return  # a captured step has a table of its own
    adam = len(states) == 3
    steps = states[2] if adam and on_device(states[2], params) else []
    tensors = params, grads, *(held for held in states[:2] if held)
    targets = Targets(effective, starts, columns, owners)
    if refused(tensors, steps, targets, 0.0) < 0:
        with torch.cuda.device_of(params[0]):
            table_of(tensors, steps, targets)


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
            _adam(tensors[0][0], table, steps, lr, 0, rates)
        return -1
    if isinstance(lr, Tensor):
        return 0
    with torch.cuda.device_of(params[0]):
        for table, counted, taken in tables_by_count(tensors, steps, targets):
            _adam(params[0], table, [], lr, taken + 1, rates)
            foreach_add_(counted, 1)
    return -1


def _adam(
    like: Tensor,
    table: Table,
    steps: list[Tensor],
    lr: float | Tensor,
    count: float,
    rates: tuple[float, float, float, float, bool, bool],
) -> None:
    """With `steps` on the device, or the `count` of this step."""
    beta1, beta2, eps, weight_decay, decoupled, maximize = rates
    held, rate = isinstance(lr, Tensor), 0.0 if isinstance(lr, Tensor) else float(lr)
    lr_at = lr if isinstance(lr, Tensor) else like
    step_size = second_scale = 0.0
    if not steps:
        step_size = -rate / (1 - beta1**count)
        second_scale = math.sqrt(1 - beta2**count)
    near = 1 - beta1 < 0.5
    factors = table.factors
    if steps:
        count_steps[(triton.cdiv(len(steps), 128),)](
            table.numbers, steps[0], lr_at, factors, table.steps, len(steps), rate,
            log_of(beta1), log_of(beta2), HELD=held, BLOCK=128,
        )  # fmt: skip
    if table.chunks:
        adam[(table.chunks,)](
            table.numbers, like, lr_at, factors, table.parts, table.targets,
            rate, step_size, second_scale, 1 - beta1 if near else -beta1, float(beta2),
            1.0 - beta2, float(eps), float(weight_decay),
            CHUNK=CHUNK, NEAR=near, MAXIMIZE=maximize,
            DECAY=weight_decay != 0 and not decoupled, SHRINK=weight_decay != 0 and decoupled,
            COUNTED=bool(steps), HELD=held, TARGETS=table.has_targets,
        )  # fmt: skip
