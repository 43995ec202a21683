"""Runs the CPU kernels on memory that begins or ends at an unreadable page (test_guard_pages.py).

A process of its own, with guard_pages.cpp as LD_PRELOAD: `python guard_pages.py VARIANT ...`. Each
variant runs in a fork, which says what it is about to run before it may die of it. Without that
library nothing is guarded: `make sanitize` then runs the same calls under a sanitizer.
"""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._dynamo  # optimizers load it, which each fork would do again
import torch.nn.functional as F
from native_conv2d import kept_conv2d, kept_conv2d_backward
from torch import nn
from torch.utils._pytree import tree_leaves

import lottery_sparse as ls
from lottery_sparse.ops.bits import reference
from lottery_sparse.ops.compact.kept import KeptLists
from lottery_sparse.ops.masked import cpu as masked_cpu
from lottery_sparse.ops.masked.arguments import MaskedArgs
from lottery_sparse.ops.packed import formats
from lottery_sparse.ops.random import cpu as random_cpu
from lottery_sparse.ops.steps import cpu as steps_cpu

SIDES = {"end": 1, "start": 2}
NOT_HERE = 77
Case = tuple[str, Callable[..., Any], tuple]

SHAPES = [(784, 300), (33, 31), (1, 2), (15, 16)]
BATCHES = [1, 31, 60]
PLAIN = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
# channels in and out, kernel, image, batch, options
CONVOLUTIONS = [
    ((3, 64), (7, 7), (64, 64), 3, {"padding": (3, 3), "stride": (2, 2)}),
    ((5, 9), (1, 1), (7, 9), 17, {}),
    ((3, 5), (3, 3), (33, 31), 2, {"padding": (1, 1)}),
    ((1, 4), (3, 3), (28, 28), 5, {"padding": (1, 1)}),
    ((4, 6), (3, 2), (9, 13), 3, {"dilation": (2, 1), "stride": (2, 3), "groups": 2}),
    ((2, 3), (3, 3), (1, 1), 1, {"padding": (1, 1)}),
    ((3, 2), (1, 1), (3, 4), 2, {"padding": (2, 3)}),
    ((3, 4), (16, 2), (40, 9), 2, {"stride": (16, 2)}),
]
DENSITIES = [0.05, 0.6, 1.0]


def lists_of(mask: torch.Tensor, spare: int = 3) -> KeptLists:
    lists = KeptLists.of(mask)
    return KeptLists.of(mask, lists.columns.shape[-1] + spare)


def linear_cases(k: int, n: int, batch: int, density: float) -> Iterator[Case]:
    name = f"linear {k} x {n}, batch {batch}, density {density}"
    for networks in (None, 2) if batch == 31 else (None,):
        e = () if networks is None else (networks,)
        mask = torch.rand(*e, n, k) < density
        lists = lists_of(mask)
        for dtype in (torch.float32, torch.bfloat16):
            x, dy = torch.randn(*e, batch, k, dtype=dtype), torch.randn(*e, batch, n, dtype=dtype)
            weight = torch.randn(*e, n, k, dtype=dtype)
            bias, values = (
                torch.randn(*e, n, dtype=dtype),
                torch.randn(lists.columns.shape).to(dtype),
            )
            what = f"{name}, {dtype}, networks {networks}"
            yield (
                f"masked {what}",
                lambda x, w, m, b, dy: (
                    masked_cpu.masked_linear(MaskedArgs(x, w, m, b)),
                    masked_cpu.masked_linear_backward(MaskedArgs(x, w, m), dy, True, True),
                ),
                (x, weight, mask, bias, dy),
            )
            yield f"compact {what}", compact_linear, (x, values, bias, dy, *lists)
            if e:
                yield f"compact {what}, shared x", compact_linear, (x[0], values, bias, dy, *lists)
            yield (
                f"gather and scatter {what}",
                gather_and_scatter,
                (weight, values, lists.starts, lists.columns),
            )
    x, dy, bias = torch.randn(batch, k), torch.randn(batch, n), torch.randn(n)
    mask = torch.rand(n, k) < density
    lists, effective = lists_of(mask), torch.zeros(n, k)
    values = torch.randn(lists.columns.shape)
    yield f"eager {name}", eager_linear, (x, values, bias, effective, dy, *lists)


def compact_linear(x, values, bias, dy, starts, columns, column_starts, rows, positions):
    ops = torch.ops.lottery_sparse_native
    y, packed = ops.compact_linear(x, values, starts, columns, bias)
    lists = starts, columns, column_starts, rows, positions
    shared = x.dim() == 2
    return y, ops.compact_linear_backward(dy, packed, values, *lists, shared, True, True, True)


def gather_and_scatter(dense, values, starts, columns):
    ops = torch.ops.lottery_sparse_native
    gathered = ops.gather_kept(dense, starts, columns)
    ops.scatter_kept_(dense, values, starts, columns)
    return gathered, dense


def eager_linear(x, values, bias, effective, dy, *lists):
    x, values, bias = (t.requires_grad_() for t in (x, values, bias))
    y = ls.ops.compact_linear(x, values, KeptLists(*lists), effective, bias, zero=True)
    return y.detach(), torch.autograd.grad(y, (x, values, bias), dy)


def conv_cases(case: tuple, density: float) -> Iterator[Case]:
    (channels, outputs), kernel, image, batch, options = case
    options = PLAIN | options
    mask = torch.rand(outputs, channels // options["groups"], *kernel) < density
    lists = lists_of(mask.flatten(1))
    values, x, bias = torch.randn(lists.columns.shape), torch.randn(batch, channels, *image), None
    y = F.conv2d(x, torch.zeros(mask.shape), **options)
    bias, dy = torch.randn(outputs), torch.randn(y.shape)
    geometry = [list(kernel), *map(list, (options[n] for n in ("stride", "padding", "dilation")))]

    def run(x, values, bias, dy, *lists):
        kept, groups = KeptLists(*lists), options["groups"]
        forward = kept_conv2d(x, values, kept, bias, *geometry, groups)
        return forward, kept_conv2d_backward(
            dy, x, values, kept, *geometry, groups, True, True, True
        )

    yield f"convolution {case}, density {density}", run, (x, values, bias, dy, *lists)

    def last(x, values, bias, dy, *lists):  # what is channels_last, as it is in memory
        y, grads = run(x.movedim(-1, -3), values, bias, dy.movedim(-1, -3), *lists)
        return y, grads

    x, dy = (t.movedim(-3, -1).contiguous() for t in (x, dy))
    yield f"channels_last {case}, density {density}", last, (x, values, bias, dy, *lists)


def packed_cases(k: int, n: int, batch: int, density: float) -> Iterator[Case]:
    name = f"{k} x {n}, batch {batch}, density {density}"
    kept, bias, x = torch.rand(n, k) < density, torch.randn(n), torch.randn(batch, k)
    signs = torch.where(kept, torch.randint(0, 2, (n, k)) * 2 - 1, 0)
    codes, ops = formats.pack_ternary(signs), torch.ops.lottery_sparse_native
    for scale in (torch.rand(1), torch.rand(n)):
        for int8 in (False, True):
            yield (
                f"ternary {name}, {len(scale)} scales, int8 {int8}",
                lambda x, c, s, b, int8=int8: ops.ternary_linear(x, c, s, b, n, int8),
                (x, codes, scale, bias),
            )
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.where(kept, torch.randn(n, k), 0.0).to(dtype)
        csr = formats.pack_csr(weight, kept)
        bitmap = *csr[:2], reference.pack_mask(kept)
        for kind, entries in (("csr", csr), ("bitmap", bitmap)):
            yield f"{kind} {name}, {dtype}", getattr(ops, f"{kind}_linear"), (x, *entries, bias)


def mask_cases(k: int, n: int) -> Iterator[Case]:
    ops, name = torch.ops.lottery_sparse_native, f"{n} x {k}"
    mask, score = torch.rand(n, k) < 0.4, torch.randn(n, k)
    count = int(mask.sum()) // 2
    yield f"keep_top {name}", lambda s, m: ops.keep_top([s], [m], count, 1, [2]), (score, mask)
    ties = score.round()
    yield (
        f"keep_top of ties {name}",
        lambda s, m: ops.keep_top([s], [m], count, 1, [2]),
        (ties, mask),
    )
    yield f"sample_mask {name}", lambda s: ops.sample_mask(s, 1, 2, 3), (score,)
    yield f"pack_mask {name}", lambda m: (ops.pack_mask(m), ops.count_kept(m)), (mask,)
    yield f"unpack_mask {name}", lambda b: ops.unpack_mask(b, k), (reference.pack_mask(mask),)
    for op in ("random_words", "random_signs", "random_uniform"):
        yield f"{op} {n * k}", lambda op=op: getattr(ops, op)(n * k, 1, 2, 3), ()


def optimizer_cases(k: int, n: int, density: float) -> Iterator[Case]:
    mask = torch.rand(n, k) < density
    lists, effective = lists_of(mask), torch.randn(n, k)
    tensors = [torch.randn(lists.columns.shape) for _ in range(2)]
    tensors += [torch.rand(lists.columns.shape) for _ in range(2)]
    rest = effective, lists.starts, lists.columns

    def sgd(p, g, first, _second, effective, starts, columns):
        lists = [[t] for t in (p, g, first, effective, starts, columns)]
        taken = steps_cpu.sgd_step(*lists, [0], 0.1, 0.9, 0.0, 0.1, True, False, False)
        return taken, p, first, effective

    def adam(p, g, first, second, effective, starts, columns):
        step = torch.ones(())
        lists = [[t] for t in (p, g, first, second, step, effective, starts, columns)]
        taken = steps_cpu.adam_step(*lists, [0], 0.1, 0.9, 0.99, 1e-8, 0.1, False, False)
        return taken, p, first, second, step, effective

    for name, call in (("SGD", sgd), ("Adam", adam)):
        yield f"step of {name}, {n} x {k}, density {density}", call, (*tensors, *rest)


def training_cases(k: int, n: int, batch: int, density: float) -> Iterator[Case]:
    masks = torch.rand(n, k) < density, torch.rand(5, n) < density
    x, y = torch.randn(batch, k), torch.randint(5, (batch,))

    def run(x, y, *masks):
        torch.manual_seed(0)
        made = ls.sparsify_(nn.Sequential(nn.Linear(k, n), nn.ReLU(), nn.Linear(n, 5)))
        ls.set_masks_(made, {"0.weight": masks[0], "2.weight": masks[1]})
        made = ls.compact_(made)
        step = ls.train_step(made, torch.optim.Adam(made.parameters(), lr=0.1))
        losses = [step(x, y) for _ in range(2)]
        return losses, [t.detach() for t in made.state_dict().values()]

    yield f"train_step, {n} x {k}, batch {batch}, density {density}", run, (x, y, *masks)


def cases() -> Iterator[Case]:
    for k, n in SHAPES:
        yield from mask_cases(k, n)
        for density in DENSITIES:
            yield from optimizer_cases(k, n, density)
        for batch in BATCHES:
            for density in DENSITIES[:2] if k > 100 else DENSITIES:
                yield from training_cases(k, n, batch, density)
                yield from linear_cases(k, n, batch, density)
                yield from packed_cases(k, n, batch, density)
    for case in CONVOLUTIONS:
        for density in DENSITIES:
            yield from conv_cases(case, density)


def read_beyond(side: str, guard: Callable[[int], None]) -> int:
    """What no kernel may do, to see that it is noticed."""
    guard(SIDES[side])
    tensor = torch.ones(5)
    address = tensor.data_ptr() + (-1 if side == "start" else 20)
    print(f"reading beyond the {side} of a tensor", flush=True)
    return ctypes.string_at(address, 1)[0] * 0


def same_bits(a: Any, b: Any) -> bool:
    if not isinstance(a, torch.Tensor):
        return a == b
    return a.shape == b.shape and torch.equal(
        *(t.contiguous().view(-1).view(torch.uint8) for t in (a, b))
    )


def main(variant: str, guard: Callable[[int], None]) -> int:
    if variant in SIDES:
        return read_beyond(variant, guard)
    os.environ["LS_CPU"] = variant
    torch.manual_seed(0)
    warnings.simplefilter("ignore")  # of layers that keep nothing
    try:
        random_cpu.random_words(1, 1, 1, 1)
    except RuntimeError as error:
        print(error)
        return NOT_HERE if "this machine can run" in str(error) else 1
    count = 0
    for name, call, tensors in cases():
        wanted = call(*(t.clone() for t in tensors))
        for side, on in SIDES.items():
            print(f"{variant}, flush at the {side}: {name}", flush=True)
            guard(on)
            got = call(*(t.clone() for t in tensors))
            guard(0)
            for one, other in zip(tree_leaves(got), tree_leaves(wanted), strict=True):
                assert same_bits(one, other), name
            del got, one
        count += 1
    print(f"{variant}: {count} calls")
    return 0


if __name__ == "__main__":
    guard = getattr(ctypes.CDLL(None), "guard_pages", lambda on: None)
    worst = 0
    for variant in sys.argv[1:]:
        child = os.fork()
        if not child:
            os._exit(main(variant, guard))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(f"{variant} ends with {status}", flush=True)
        worst = worst or (status if status != NOT_HERE else 0)
    sys.exit(1 if worst else 0)
