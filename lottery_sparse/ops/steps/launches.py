"""sgd_step and adam_step on a GPU: a step of all Parameters of one device and dtype, by one launch.

A backend gives the launches; here is what comes before them. A launch updates Parameters and
writes the new values into the dense effective weights that hold them. Where they lie is in a table
on the device (tables.py), which is made anew when one has moved. What a mask keeps is read from the
lists as the step runs, so a captured step follows a changed mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lottery_sparse.ops.common.torch_private import foreach_add_
from lottery_sparse.ops.steps.tables import (
    Targets,
    on_device,
    refused,
    table_of,
    tables_by_count,
)

Lists = list[Tensor]


class SgdOptions(NamedTuple):
    lr: float | Tensor  # a number, or a float32 tensor on the device
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    maximize: bool
    first: bool  # momenta are not read


class AdamOptions(NamedTuple):
    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool  # AdamW
    maximize: bool

    def factors(self, count: float) -> tuple[float, float]:
        """-lr / (1 - beta1^count) and the root of 1 - beta2^count, of step `count`."""
        return -float(self.lr) / (1 - self.beta1**count), math.sqrt(1 - self.beta2**count)


def rate_of(lr: float | Tensor) -> tuple[Tensor | None, float]:
    """The learning rate as a tensor, or as a number."""
    return (lr, 0.0) if isinstance(lr, Tensor) else (None, float(lr))


def sgd_step(
    launch: Callable,
    params: Lists,
    grads: Lists,
    momenta: Lists,
    effective: Lists,
    starts: Lists,
    columns: Lists,
    owners: list[int],
    *options: float | Tensor,
) -> int:
    """A step of torch.optim.SGD.

    Args:
        launch: (table, a Parameter, number of states, SgdOptions); the table has chunks.
        params, grads: of one device and one of float32, float16 and bfloat16, contiguous.
        momenta: as many, or none for momentum = 0.
        effective, starts, columns, owners: dense weights, and lists of compact Parameters, each
            with the position of its Parameter. Spare slots are left alone; an effective weight
            without elements is not written.
        options: `SgdOptions`.

    Returns:
        -1; or, with nothing done, the position of a Parameter that the kernel does not take.
    """
    o = SgdOptions(*options)  # pyright: ignore[reportArgumentType]
    tensors = (params, grads, momenta) if o.momentum != 0 else (params, grads)
    targets = Targets(effective, starts, columns, owners)
    position = refused(tensors, [], targets, o.lr)
    if position >= 0:
        return position
    with torch.cuda.device_of(params[0]):
        table = table_of(tensors, [], targets)
        if table.chunks:
            launch(table, params[0], len(tensors) - 2, o)
    return -1


def adam_step(
    launch: Callable,
    params: Lists,
    grads: Lists,
    exp_avgs: Lists,
    exp_avg_sqs: Lists,
    steps: Lists,
    effective: Lists,
    starts: Lists,
    columns: Lists,
    owners: list[int],
    *options: float | Tensor,
) -> int:
    """A step of torch.optim.Adam or AdamW; arguments as in `sgd_step`, options `AdamOptions`.

    `steps` count on the host, each before this step; or on the device, where a launch before that
    of the step counts, so that both can be captured. On the host, Parameters that have taken
    another number of steps are another launch.

    Args:
        launch: (table, a Parameter, steps on the device, or else the count of this step,
            AdamOptions).
    """
    o = AdamOptions(*options)  # pyright: ignore[reportArgumentType]
    tensors = params, grads, exp_avgs, exp_avg_sqs
    targets = Targets(effective, starts, columns, owners)
    position = refused(tensors, steps, targets, o.lr)
    if position >= 0:
        return position
    with torch.cuda.device_of(params[0]):
        if on_device(steps, params):
            launch(table_of(tensors, steps, targets), params[0], steps, 0, o)
            return -1
        if isinstance(o.lr, Tensor):
            return 0
        for table, counted, taken in tables_by_count(tensors, steps, targets):
            launch(table, params[0], [], taken + 1, o)
            foreach_add_(counted, 1)
    return -1


def prepare_step(
    params: Lists,
    grads: Lists,
    states: tuple[Lists, ...],
    effective: Lists,
    starts: Lists,
    columns: Lists,
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
