"""sgd_step and adam_step: a step of all Parameters of one device and dtype in one launch.

A program updates a chunk of one Parameter and writes the new values into the dense effective
weights that hold them. Where they lie is in a table on the device, see `step_tables`, which is made
anew when one has moved. What a mask keeps is read from the lists as the step runs, so a captured
step follows a changed mask.
"""
# pyright: reportArgumentType=false, reportOperatorIssue=false
# ... since a launch takes plain numbers for constexpr, and jit functions are not understood

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from lottery_sparse.kernels.compact_linear import load_columns
from lottery_sparse.step_tables import CHUNK, PART, TARGET, Targets, refused, table_of

PART_, TARGET_ = tl.constexpr(PART), tl.constexpr(TARGET)


@triton.jit
def row_of(starts, rows, slot, WIDTH: tl.constexpr):
    """The last of the rows with starts[row] <= slot: 256 at a time, two loads for 65,536 rows."""
    low = rows * 0
    count = rows
    while count > 1:
        step = tl.cdiv(count, WIDTH)
        ahead = tl.arange(0, WIDTH) * step
        begin = tl.load(starts + low + ahead, mask=ahead < count, other=0)
        passed = tl.sum(((begin <= slot) & (ahead < count)).to(tl.int32), 0)
        skip = tl.maximum(passed - 1, 0) * step
        low += skip
        count = tl.minimum(step, count - skip)
    return low


@triton.jit
def load(address, like, begin, i, inside, WHOLE: tl.constexpr):
    """A chunk as float32."""
    at = address.to(like.dtype) + begin
    if WHOLE:
        return tl.load(tl.multiple_of(at, 16) + i).to(tl.float32)
    return tl.load(at + i, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store(address, like, begin, i, value, inside, WHOLE: tl.constexpr):
    at = address.to(like.dtype) + begin
    value = value.to(like.dtype.element_ty)
    if WHOLE:
        tl.store(tl.multiple_of(at, 16) + i, value)
    else:
        tl.store(at + i, value, mask=inside)


@triton.jit
def write(dense, kind, at, value, inside):
    """Into a dense weight of either kind, see `_KINDS`."""
    if kind == 0:
        tl.store(dense.to(tl.pointer_type(tl.float32)) + at, value, mask=inside)
    elif kind == 1:
        tl.store(dense.to(tl.pointer_type(tl.float16)) + at, value.to(tl.float16), mask=inside)
    else:
        tl.store(dense.to(tl.pointer_type(tl.bfloat16)) + at, value.to(tl.bfloat16), mask=inside)


@triton.jit
def scatter(target, slot, first, last, value, inside):
    """The values of slots to their places; those inside are first … last."""
    dense = tl.load(target)
    starts = tl.load(target + 1).to(tl.pointer_type(tl.int64))
    columns = tl.load(target + 2)
    rows, row_length = tl.load(target + 3).to(tl.int32), tl.load(target + 4)
    kind = tl.load(target + 5).to(tl.int32)
    row = row_of(starts, rows, first, 256)
    span = row_of(starts, rows, last, 256) - row
    low = tl.zeros_like(slot) + row
    high = low + span
    slot = tl.minimum(tl.maximum(slot, first), last)
    while span > 0:
        middle = (low + high + 1) >> 1
        begun = tl.load(starts + middle) <= slot
        low = tl.where(begun, middle, low)
        high = tl.where(begun, high, middle - 1)
        span = span >> 1
    if kind >= 4:
        column = load_columns(columns.to(tl.pointer_type(tl.int32)), slot, inside)
    else:
        column = load_columns(columns.to(tl.pointer_type(tl.int16)), slot, inside)
    write(dense, kind & 3, low.to(tl.int64) * row_length + column, value, inside)


@triton.jit
def place(table, parts, targets, CHUNK: tl.constexpr):
    """(part, its first element here, how many it has to update, whether whole vectors fit)."""
    program = tl.program_id(0)
    number = row_of(table, parts, program, 256)
    part = table + parts + 1 + number * PART_
    shift = tl.load(part + 5)
    begin = (program - tl.load(table + number)) * CHUNK - tl.maximum(shift, 0)
    used = tl.load(part + 4)
    first, last = tl.load(part + 7), tl.load(part + 8)
    if first < last:  # spare slots are left alone
        target = targets + first * TARGET_
        starts = tl.load(target + 1).to(tl.pointer_type(tl.int64))
        used = tl.minimum(used, tl.load(starts + tl.load(target + 3)))
    whole = (shift >= 0) & (begin >= 0) & (begin + CHUNK <= used)
    return part, begin, used, whole


@triton.jit
def spread(targets, part, begin, used, value, CHUNK: tl.constexpr):
    """The new values of a chunk into all effective weights that hold them."""
    slot = begin.to(tl.int32) + tl.arange(0, CHUNK)
    inside = (slot >= 0) & (slot < used)
    first = tl.maximum(begin, 0).to(tl.int32)
    last = (tl.minimum(begin + CHUNK, used) - 1).to(tl.int32)
    if first <= last:
        for number in range(tl.load(part + 7), tl.load(part + 8)):
            target = targets + number * TARGET_
            if tl.load(target) != 0:
                scatter(target, slot, first, last, value, inside)


@triton.jit
def entries(begin, used, CHUNK: tl.constexpr):
    """0 … CHUNK - 1, and which of them the part has to update."""
    i = tl.arange(0, CHUNK)
    first, last = tl.maximum(-begin, 0).to(tl.int32), tl.minimum(used - begin, CHUNK).to(tl.int32)
    return i, (i >= first) & (i < last)


@triton.jit
def descent(grad, value, weight_decay, MAXIMIZE: tl.constexpr, DECAY: tl.constexpr):
    """The gradient to descend, with L2 decay."""
    g = -grad if MAXIMIZE else grad
    return g + weight_decay * value if DECAY else g


@triton.jit
def sgd_chunk(
    part, like, begin, used, lr, momentum, undamped, weight_decay,
    CHUNK: tl.constexpr, STATES: tl.constexpr, FIRST: tl.constexpr, NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr, DECAY: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    i, inside = entries(begin, used, CHUNK)
    address = tl.load(part)
    value = load(address, like, begin, i, inside, WHOLE)
    g = load(tl.load(part + 1), like, begin, i, inside, WHOLE)
    g = descent(g, value, weight_decay, MAXIMIZE, DECAY)
    if STATES == 1:
        state, buffer = tl.load(part + 2), g
        if not FIRST:
            held = load(state, like, begin, i, inside, WHOLE)
            buffer = held * momentum + undamped * g
        store(state, like, begin, i, buffer, inside, WHOLE)
        g = g + momentum * buffer if NESTEROV else buffer
    value = value - lr * g
    store(address, like, begin, i, value, inside, WHOLE)
    return value


@triton.jit(do_not_specialize=["parts", "listed"])
def _sgd(
    table, like, lr_at, parts, listed, lr, momentum, undamped, weight_decay,
    CHUNK: tl.constexpr, STATES: tl.constexpr, FIRST: tl.constexpr, NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr, DECAY: tl.constexpr, HELD: tl.constexpr, TARGETS: tl.constexpr,
):  # fmt: skip
    """A step of SGD; with HELD, the learning rate lies on the device."""
    targets = table + listed
    part, begin, used, whole = place(table, parts, targets, CHUNK)
    if HELD:
        lr = tl.load(lr_at)
    if whole:
        value = sgd_chunk(
            part, like, begin, used, lr, momentum, undamped, weight_decay,
            CHUNK, STATES, FIRST, NESTEROV, MAXIMIZE, DECAY, True,
        )  # fmt: skip
    else:
        value = sgd_chunk(
            part, like, begin, used, lr, momentum, undamped, weight_decay,
            CHUNK, STATES, FIRST, NESTEROV, MAXIMIZE, DECAY, False,
        )  # fmt: skip
    if TARGETS:
        spread(targets, part, begin, used, value, CHUNK)


@triton.jit
def adam_chunk(
    part, like, begin, used, step_size, second_scale, weight, beta2, second_weight, eps,
    weight_decay, shrink,
    CHUNK: tl.constexpr, NEAR: tl.constexpr, MAXIMIZE: tl.constexpr, DECAY: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    i, inside = entries(begin, used, CHUNK)
    address, first, second = tl.load(part), tl.load(part + 2), tl.load(part + 3)
    value = load(address, like, begin, i, inside, WHOLE)
    g = load(tl.load(part + 1), like, begin, i, inside, WHOLE)
    m = load(first, like, begin, i, inside, WHOLE)
    v = load(second, like, begin, i, inside, WHOLE)
    g = descent(g, value, weight_decay, MAXIMIZE, DECAY)
    m = weight * (g - m) + (m if NEAR else g)  # from the nearer end, as torch.lerp does
    v = v * beta2 + second_weight * g * g
    store(first, like, begin, i, m, inside, WHOLE)
    store(second, like, begin, i, v, inside, WHOLE)
    denominator = tl.div_rn(tl.sqrt_rn(v), tl.zeros_like(v) + second_scale) + eps
    value = value * shrink + tl.div_rn(step_size * m, denominator)
    store(address, like, begin, i, value, inside, WHOLE)
    return value


@triton.jit(do_not_specialize=["parts", "listed"])
def _adam(
    table, like, lr_at, factors, parts, listed, lr, step_size, second_scale,
    weight, beta2, second_weight, eps, weight_decay,
    CHUNK: tl.constexpr, NEAR: tl.constexpr, MAXIMIZE: tl.constexpr, DECAY: tl.constexpr,
    SHRINK: tl.constexpr, COUNTED: tl.constexpr, HELD: tl.constexpr, TARGETS: tl.constexpr,
):  # fmt: skip
    """A step of Adam; with COUNTED, `_count` has left each Parameter's factors on the device."""
    targets = table + listed
    part, begin, used, whole = place(table, parts, targets, CHUNK)
    if COUNTED:
        own = factors + 2 * tl.load(part + 6)
        step_size, second_scale = tl.load(own), tl.load(own + 1)
    if HELD:
        lr = tl.load(lr_at)
    shrink = 1.0 - lr * weight_decay if SHRINK else 1.0
    if whole:
        value = adam_chunk(
            part, like, begin, used, step_size, second_scale, weight, beta2, second_weight, eps,
            weight_decay, shrink, CHUNK, NEAR, MAXIMIZE, DECAY, True,
        )  # fmt: skip
    else:
        value = adam_chunk(
            part, like, begin, used, step_size, second_scale, weight, beta2, second_weight, eps,
            weight_decay, shrink, CHUNK, NEAR, MAXIMIZE, DECAY, False,
        )  # fmt: skip
    if TARGETS:
        spread(targets, part, begin, used, value, CHUNK)


@triton.jit(do_not_specialize=["listed", "count"])
def _count(
    table, like, lr_at, factors, listed, count, lr, log_beta1, log_beta2,
    HELD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Steps on the device: t += 1, and what follows from it, in float64 as torch's fused step."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    step = tl.load(table + listed + i, mask=inside, other=0).to(like.dtype)
    t = tl.load(step, mask=inside, other=1.0) + 1
    tl.store(step, t, mask=inside)
    if HELD:
        lr = tl.load(lr_at)
    t = t.to(tl.float64)
    first, second = 1.0 - tl.exp(t * log_beta1), 1.0 - tl.exp(t * log_beta2)
    tl.store(factors + 2 * i, (-lr / first).to(tl.float32), mask=inside)
    tl.store(factors + 2 * i + 1, tl.sqrt(second).to(tl.float32), mask=inside)


# ---- steps ---------------------------------------------------------------------------------------


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
            _sgd[(table.chunks,)](
                table.numbers, params[0], lr if held else params[0], table.parts, table.targets,
                0.0 if held else float(lr), float(momentum), 1.0 - dampening, float(weight_decay),
                CHUNK=CHUNK, STATES=len(tensors) - 2, FIRST=first, NESTEROV=nesterov,
                MAXIMIZE=maximize, DECAY=weight_decay != 0, HELD=held, TARGETS=table.has_targets,
            )  # fmt: skip
    return -1


def on_device(steps: list[Tensor], params: list[Tensor]) -> bool:
    """Whether step counts lie beside the Parameters, as with `capturable` and `fused`."""
    return steps[0].device == params[0].device


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
        _adam_launch(tensors, steps, targets, lr, 0, rates)
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
        if len(mine) == len(params):
            _adam_launch(tensors, [], targets, lr, count, rates)
        else:
            some = tuple([held[p] for p in mine] for held in tensors)
            _adam_launch(some, [], targets.of(mine), lr, count, rates)
    return -1


def _adam_launch(
    tensors: tuple[list[Tensor], ...],
    steps: list[Tensor],
    targets: Targets,
    lr: float | Tensor,
    count: float,
    rates: tuple[float, float, float, float, bool, bool],
) -> None:
    """With `steps` on the device, or the `count` of this step."""
    beta1, beta2, eps, weight_decay, decoupled, maximize = rates
    first = tensors[0][0]
    held, rate = isinstance(lr, Tensor), 0.0 if isinstance(lr, Tensor) else float(lr)
    lr_at = lr if isinstance(lr, Tensor) else first
    step_size = second_scale = 0.0
    if not steps:
        step_size = -rate / (1 - beta1**count)
        second_scale = math.sqrt(1 - beta2**count)
    near = 1 - beta1 < 0.5
    with torch.cuda.device_of(first):
        table = table_of(tensors, steps, targets)
        factors = table.numbers
        if steps:
            factors = torch.empty(2 * len(steps), dtype=torch.float32, device=first.device)
            _count[(triton.cdiv(len(steps), 128),)](
                table.numbers, steps[0], lr_at, factors, table.steps, len(steps), rate,
                _log(beta1), _log(beta2), HELD=held, BLOCK=128,
            )  # fmt: skip
        if table.chunks:
            _adam[(table.chunks,)](
                table.numbers, first, lr_at, factors, table.parts, table.targets,
                rate, step_size, second_scale, 1 - beta1 if near else -beta1, float(beta2),
                1.0 - beta2, float(eps), float(weight_decay),
                CHUNK=CHUNK, NEAR=near, MAXIMIZE=maximize,
                DECAY=weight_decay != 0 and not decoupled, SHRINK=weight_decay != 0 and decoupled,
                COUNTED=bool(steps), HELD=held, TARGETS=table.has_targets,
            )  # fmt: skip


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf
