"""Prints the digests of what the CPU kernels compute, a line for each call (test_cpu_bits.py).

A process of its own, as a process has one kernel variant: `LS_CPU=avx2 python cpu_bits.py THREADS`.
"""

from __future__ import annotations

import hashlib
import sys
import warnings
from collections.abc import Iterator

import guard_pages
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import lottery_sparse as ls
from lottery_sparse.ops.bits import reference
from lottery_sparse.ops.compact.kept import KeptLists
from lottery_sparse.ops.packed import formats

ops = torch.ops.lottery_sparse_native


def normal(*shape: int, seed: int) -> Tensor:
    """Inputs that are the same on every machine: drawn by integer arithmetic."""
    return ls.random.normal(shape, seed=seed)


def mask_of(*shape: int, density: float, seed: int) -> Tensor:
    return ls.random.uniform(shape, seed=seed) < density


# rows of x, columns, rows of the weight, density: ragged, and more tiles than are summed at a time
LINEAR = [(60, 784, 300, 0.05), (13, 131, 77, 0.3), (200, 1500, 40, 0.1), (1, 70, 5, 0.5)]
# images, channels in and out, image, density, stride; of these some are planes, some tiles
CONVOLUTIONS = [
    (3, 3, 8, 32, 0.08, 1),
    (5, 1, 6, 28, 0.2, 1),
    (19, 8, 16, 15, 0.1, 2),
    (5, 8, 16, 9, 0.3, 1),
]


def linear(batch: int, k: int, n: int, density: float) -> Iterator[tuple[str, list[Tensor]]]:
    name = f"{k} x {n}, batch {batch}"
    mask, weight = mask_of(n, k, density=density, seed=1), normal(n, k, seed=2)
    x, dy, bias = normal(batch, k, seed=3), normal(batch, n, seed=4), normal(n, seed=5)
    lists, values = KeptLists.of(mask), weight[mask]
    yield f"masked forward {name}", [ops.masked_linear(x, weight, mask, bias)]
    backward = ops.masked_linear_backward(dy, x, weight, mask, True, True)
    yield f"masked backward {name}", list(backward)
    yield (
        f"compact {name}",
        tree_leaves(guard_pages.compact_linear(x, values, bias, dy, *lists)),
    )
    starts, columns = lists.starts, lists.columns
    for count in sorted({1, min(2, batch), batch}):
        rows, what = x[:count], f"{k} x {n}, batch {count}"
        yield f"csr {what}", [ops.csr_linear(rows, values, starts, columns, bias)]
        bits = reference.pack_mask(mask)
        yield f"bitmap {what}", [ops.bitmap_linear(rows, values, starts, bits, bias)]
        codes = formats.pack_ternary(torch.where(mask, weight.sign(), 0).to(torch.int8))
        yield f"ternary {what}", [ops.ternary_linear(rows, codes, bias, bias, n, False)]
        yield f"int8 ternary {what}", [ops.ternary_linear(rows, codes, bias, bias, n, True)]


def convolution(case: tuple) -> tuple[str, list[Tensor]]:
    batch, inputs, outputs, side, density, stride = case
    mask = mask_of(outputs, inputs * 9, density=density, seed=1)
    lists, values = KeptLists.of(mask), normal(int(mask.sum()), seed=2)
    x, bias = normal(batch, inputs, side, side, seed=3), normal(outputs, seed=4)
    geometry = [3, 3], [stride, stride], [1, 1], [1, 1], 1
    y = ops.compact_conv2d(x, values, lists.starts, lists.columns, bias, *geometry, False)
    dy = normal(*y.shape, seed=5)
    grads = ops.compact_conv2d_backward(dy, x, values, *lists, *geometry, False, True, True, True)
    return f"convolution {case}", [y, *grads]


def selection() -> Iterator[tuple[str, list[Tensor]]]:
    mask, score = mask_of(300, 70, density=0.5, seed=1), normal(300, 70, seed=2)
    yield "keep_top", ops.keep_top([score.round()], [mask], 3000, 1, [2])
    yield "sample_mask", [ops.sample_mask(score, 1, 2, 3)]
    yield "random", [normal(1000, seed=1), ls.random.uniform((1000,), seed=1)]


def training(kind: type, masked: type | None) -> tuple[str, list[Tensor]]:
    """Three steps by train_step: of compact layers, or of layers that learn their masks."""
    made = nn.Sequential(nn.Linear(70, 33), nn.ReLU(), nn.Linear(33, 7))
    with torch.no_grad():
        for i, p in enumerate(made.parameters()):
            p.copy_(normal(*p.shape, seed=i) / 8)
    ls.sparsify_(made)
    if masked is None:
        masks = {n: mask_of(*m.shape, density=0.2, seed=9) for n, m in ls.masks_of(made).items()}
        ls.set_masks_(made, masks)
        ls.compact_(made)
    else:
        ls.supermask_(made, learned="sample")
    step = ls.train_step(made, kind(made.parameters(), lr=0.1))
    x, y = normal(60, 70, seed=7), torch.arange(60) % 7
    losses = [step(x, y) for _ in range(3)]
    name = f"train_step, {kind.__name__}, {'learned' if masked else 'compact'}"
    return name, [*losses, *(t.detach() for t in made.parameters())]


def own() -> Iterator[tuple[str, list[Tensor]]]:
    for shape in LINEAR:
        yield from linear(*shape)
    for case in CONVOLUTIONS:
        yield convolution(case)
    yield from selection()


def steps() -> Iterator[tuple[str, list[Tensor]]]:
    yield training(ls.optim.SGD, None)
    yield training(ls.optim.Adam, None)


def ragged() -> Iterator[tuple[str, list[Tensor]]]:
    """The calls of guard_pages.py in float32, but for those that the dense library may take."""
    torch.manual_seed(0)
    for name, call, tensors in guard_pages.cases():
        if "bfloat16" in name or name.startswith("eager"):
            continue
        yield name, tree_leaves(call(*(t.clone() for t in tensors)))


def digest(tensors: list) -> str:
    found = hashlib.sha256()
    for t in tensors:
        if isinstance(t, Tensor):
            found.update(t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        else:
            found.update(str(t).encode())
    return found.hexdigest()[:16]


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # of layers that keep nothing
    torch.set_num_threads(int(sys.argv[1]))
    for group in (own, steps, ragged):
        for name, tensors in group():
            print(f"{group.__name__}\t{name}\t{digest(tensors)}")
