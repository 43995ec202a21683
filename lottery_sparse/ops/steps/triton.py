"""The launches of sgd_step and adam_step: a program updates a chunk of one Parameter."""
# pyright: reportArgumentType=false
# ... since a launch takes plain numbers for constexpr

from __future__ import annotations

from functools import partial

import triton
from torch import Tensor

from lottery_sparse.ops.steps import launches
from lottery_sparse.ops.steps.launches import AdamOptions, SgdOptions, rate_of
from lottery_sparse.ops.steps.launches import prepare_step as prepare_step
from lottery_sparse.ops.steps.tables import CHUNK, Table, log_of
from lottery_sparse.ops.steps.triton_kernels import adam, count_steps, sgd


def _sgd(table: Table, like: Tensor, states: int, o: SgdOptions) -> None:
    held, rate = rate_of(o.lr)
    sgd[(table.chunks,)](
        table.numbers, like, like if held is None else held, table.parts, table.targets,
        rate, float(o.momentum), 1.0 - o.dampening, float(o.weight_decay),
        CHUNK=CHUNK, STATES=states, FIRST=o.first, NESTEROV=o.nesterov, MAXIMIZE=o.maximize,
        DECAY=o.weight_decay != 0, HELD=held is not None, TARGETS=table.has_targets,
    )  # fmt: skip


def _adam(table: Table, like: Tensor, steps: list[Tensor], count: float, o: AdamOptions) -> None:
    held, rate = rate_of(o.lr)
    lr, factors, numbers = like if held is None else held, table.factors, (0.0, 0.0)
    if steps:
        count_steps[(triton.cdiv(len(steps), 128),)](
            table.numbers, steps[0], lr, factors, table.steps, len(steps), rate,
            log_of(o.beta1), log_of(o.beta2), HELD=held is not None, BLOCK=128,
        )  # fmt: skip
    else:
        numbers = o.factors(count)
    near, decays = 1 - o.beta1 < 0.5, o.weight_decay != 0
    if table.chunks:
        adam[(table.chunks,)](
            table.numbers, like, lr, factors, table.parts, table.targets,
            rate, *numbers, 1 - o.beta1 if near else -o.beta1, float(o.beta2),
            1.0 - o.beta2, float(o.eps), float(o.weight_decay),
            CHUNK=CHUNK, NEAR=near, MAXIMIZE=o.maximize,
            DECAY=decays and not o.decoupled, SHRINK=decays and o.decoupled,
            COUNTED=bool(steps), HELD=held is not None, TARGETS=table.has_targets,
        )  # fmt: skip


sgd_step, adam_step = partial(launches.sgd_step, _sgd), partial(launches.adam_step, _adam)
