"""The kernels of masked_optim: a chunk of a Parameter is read, stepped, written and scattered.

Where it lies, and which effective weights hold it, they read from a table, see `step_tables`.
"""
# pyright: reportArgumentType=false, reportOperatorIssue=false
# ... since a call takes plain numbers for constexpr, and jit functions are not understood

from __future__ import annotations

import triton
import triton.language as tl

from lottery_sparse.ops.compact.triton import load_columns
from lottery_sparse.ops.steps.tables import PART, TARGET

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
    """Into a dense weight of either kind, see `step_tables`."""
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
def sgd(
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
def adam(
    table, like, lr_at, factors, parts, listed, lr, step_size, second_scale,
    weight, beta2, second_weight, eps, weight_decay,
    CHUNK: tl.constexpr, NEAR: tl.constexpr, MAXIMIZE: tl.constexpr, DECAY: tl.constexpr,
    SHRINK: tl.constexpr, COUNTED: tl.constexpr, HELD: tl.constexpr, TARGETS: tl.constexpr,
):  # fmt: skip
    """A step of Adam; with COUNTED, `count_steps` has left a Parameter's factors on the device."""
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
def count_steps(
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
