"""sgd_step and adam_step for the backend "cuda": a step of all Parameters of one device and dtype.

One launch, from the tables of step_tables; see csrc/cuda_optim.h. A captured step follows a changed
mask, and Adam's step counts may lie on the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lottery_sparse.step_tables import Table, Targets, refused, table_of

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
            table.numbers, table.steps, len(steps), held, rate, _log(beta1), _log(beta2)
        )
        if table.chunks:
            _ops.adam_step(*_where(table, params[0], lr), factors, 0.0, 0.0, *rates)
        return -1
    if isinstance(lr, Tensor):
        return 0
    if params[0].is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "Adam's step counts are on the host, which a captured graph would not count; use "
            "capturable=True or fused=True, and take a step before the capture."
        )
    torch._foreach_add_(steps, 1)  # pyright: ignore[reportPrivateImportUsage]
    counts = [step.item() for step in steps]
    for count in sorted(set(counts)):
        mine = [i for i, c in enumerate(counts) if c == count]
        some, held = tensors, targets
        if len(mine) < len(params):
            some, held = tuple([t[p] for p in mine] for t in tensors), targets.of(mine)
        with torch.cuda.device_of(params[0]):
            table = table_of(some, [], held)
        if table.chunks:
            factors = -lr / (1 - beta1**count), math.sqrt(1 - beta2**count)
            _ops.adam_step(*_where(table, params[0], lr), None, *factors, *rates)
    return -1


def on_device(steps: list[Tensor], params: list[Tensor]) -> bool:
    """Whether step counts lie beside the Parameters, as with `capturable` and `fused`."""
    return steps[0].device == params[0].device


def _where(table: Table, like: Tensor, lr: float | Tensor) -> tuple:
    """What a launch needs to know of a table, and the learning rate."""
    return table.numbers, like, table.parts, table.targets, table.chunks, *_rate(lr)


def _rate(lr: float | Tensor) -> tuple[Tensor | None, float]:
    return (lr, 0.0) if isinstance(lr, Tensor) else (None, float(lr))


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf
