"""The CPU kernels use torch's threads: as many as torch.set_num_threads says, and no other bits.

A loop that should be parallel and is not gives the right numbers, so the kernels count threads.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import lottery_sparse as ls
from lottery_sparse.ops import dispatch
from lottery_sparse.ops.bits import reference
from lottery_sparse.ops.common.eager import has_node
from lottery_sparse.ops.compact.kept import KeptLists
from lottery_sparse.ops.packed import formats

if not dispatch.built("cpu"):
    pytest.skip("the native kernels (lottery_sparse._C) are not built", allow_module_level=True)
from lottery_sparse.ops.bits import cpu as bits_cpu
from lottery_sparse.ops.masked import cpu as masked_cpu
from lottery_sparse.ops.masked.arguments import MaskedArgs
from lottery_sparse.ops.random import cpu as random_cpu
from lottery_sparse.ops.selection import cpu as selection_cpu
from lottery_sparse.ops.supermask import cpu as supermask_cpu

OPS = torch.ops.lottery_sparse_native
NETWORKS, BATCH, INPUTS, OUTPUTS = 4, 96, 320, 512
COUNTS = [1, 2, 4]


def threads_used(call):
    """What `call` returns, and how many threads ran loops of _C or of _eager meanwhile."""
    counters = [OPS.threads_used]
    if has_node():
        counters.append(torch.ops.lottery_sparse_eager.threads_used)
    for count in counters:
        count()
    result = call()
    return result, max(count() for count in counters)


def matrix(density=0.3, *networks):
    mask = torch.rand(*networks, OUTPUTS, INPUTS) < density
    return mask, torch.randn(*networks, OUTPUTS, INPUTS)


def masked_linear(dtype):
    mask, weight = matrix()
    x, dy = torch.randn(BATCH, INPUTS).to(dtype), torch.randn(BATCH, OUTPUTS).to(dtype)
    weight = weight.to(dtype)
    a = MaskedArgs(x, weight, mask)
    yield lambda: masked_cpu.masked_linear(a)
    yield lambda: masked_cpu.masked_linear_backward(a, dy, True, True)


def compact_linear(dtype, density=0.3):
    """By the node of _eager in float32, which takes the dense library where much is kept."""
    mask, weight = matrix(density)
    kept, effective = KeptLists.of(mask), torch.where(mask, weight, 0.0).to(dtype)
    values = effective[mask].requires_grad_()
    x, bias = torch.randn(BATCH, INPUTS, dtype=dtype), torch.randn(OUTPUTS, dtype=dtype)
    x, bias = x.requires_grad_(), bias.requires_grad_()
    dy = torch.randn(BATCH, OUTPUTS, dtype=dtype)

    def forward():
        return ls.ops.compact_linear(x, values, kept, effective, bias, zero=True)

    def backward(y):
        return torch.autograd.grad(y, (x, values, bias), dy, retain_graph=True)

    yield from there_and_back(forward, backward, forced=dtype != torch.float32)


def there_and_back(forward, backward, forced):
    """Both calls, `forced` on the kernels: dispatch prefers the dense library on some machines."""

    def chosen():
        return ls.use_backend("cpu") if forced else contextlib.nullcontext()

    def there():
        with chosen():
            return forward()

    def back():
        with chosen():
            return backward(y)

    yield lambda: there().detach()
    y = there()
    yield back


def compact_conv2d(size, density):
    """With many images the kernels' lanes, with few kept weights their planes."""
    x = torch.randn(*size, requires_grad=True)
    mask = torch.rand(64, size[1], 3, 3) < density
    kept, effective = KeptLists.of(mask.flatten(1)), torch.where(mask, torch.randn(mask.shape), 0.0)
    values = effective[mask].requires_grad_()
    bias = torch.randn(64, requires_grad=True)

    def forward():
        return ls.ops.compact_conv2d(x, values, kept, effective, bias, zero=True, padding=1)

    def backward(y):
        return torch.autograd.grad(y, (x, values, bias), torch.ones_like(y), retain_graph=True)

    yield from there_and_back(forward, backward, forced=True)


def packed():
    mask, weight = matrix()
    weight = torch.where(mask, weight, 0.0)
    signs, scale, bits = weight.sign(), torch.ones(1), reference.pack_mask(mask)
    codes = formats.pack_ternary(signs)
    csr = formats.pack_csr(weight, mask)
    for x in (torch.randn(1, INPUTS), torch.randn(20, INPUTS)):
        yield lambda x=x: ls.ops.csr_linear(x, *csr)
        yield lambda x=x: ls.ops.bitmap_linear(x, *csr[:2], bits)
        yield lambda x=x: ls.ops.ternary_linear(x, codes, scale, OUTPUTS)
        yield lambda x=x: ls.ops.ternary_linear(x, codes, scale, OUTPUTS, activations="int8")
        yield lambda x=x: ls.ops.ternary_linear(x.bfloat16(), codes, scale, OUTPUTS)


def masks():
    score = torch.randn(1 << 20)
    mask = torch.rand(1 << 20) < 0.5
    rows = mask.view(1 << 10, -1)
    key, table = ls.random.key(1, 2, 3), torch.arange(1 << 15, dtype=torch.int32)
    yield lambda: selection_cpu.keep_top([score], [mask], 1 << 18, 1, [2])
    yield lambda: selection_cpu.keep_top([score.round()], [mask], 1 << 18, 1, [2])
    yield lambda: supermask_cpu.sample_mask(score, key)
    yield lambda: random_cpu.random_normal(1 << 20, 1, 2, 3, table)
    yield lambda: random_cpu.random_words(1 << 20, 1, 2, 3)
    yield lambda: bits_cpu.pack_mask(rows)
    yield lambda: bits_cpu.unpack_mask(reference.pack_mask(rows), rows.shape[1])


def model(density=0.3):
    made = ls.sparsify_(nn.Sequential(nn.Linear(INPUTS, OUTPUTS), nn.ReLU(), nn.Linear(OUTPUTS, 5)))
    weights = {"0.weight": made[0].weight, "2.weight": made[2].weight}
    ls.set_masks_(made, {name: torch.rand_like(w) < density for name, w in weights.items()})
    return ls.compact_(made)


def optimizer(cls):
    def run():
        torch.manual_seed(0)
        made = model()
        stepping = cls(made.parameters(), lr=0.1)
        for p in made.parameters():
            p.grad = torch.randn(p.shape)

        def step():
            stepping.step()
            return list(made.state_dict().values())

        return step

    yield run


def training():
    def run():
        torch.manual_seed(0)
        many = ls.ensemble.replicate([model() for _ in range(NETWORKS)])
        step = ls.train_step(many, torch.optim.SGD(many.parameters(), lr=0.1))
        x, y = torch.randn(BATCH, INPUTS), torch.randint(5, (BATCH,))
        return lambda: (step(x, y), list(many.state_dict().values()))

    yield run


STATELESS = {
    "masked linear": lambda: masked_linear(torch.float32),
    "masked linear, bfloat16": lambda: masked_linear(torch.bfloat16),
    "compact linear": lambda: compact_linear(torch.float32),
    "compact linear, bfloat16": lambda: compact_linear(torch.bfloat16),
    "compact convolution by lanes": lambda: compact_conv2d((64, 16, 12, 12), 0.3),
    "compact convolution by planes": lambda: compact_conv2d((64, 8, 16, 16), 0.05),
    "packed": packed,
    "masks": masks,
}


# each gives a new one with the state that it starts from
STATEFUL = {
    "SGD": lambda: optimizer(ls.optim.SGD),
    "Adam": lambda: optimizer(ls.optim.Adam),
    "train_step": training,
}


@pytest.mark.parametrize("kind", [*STATELESS, *STATEFUL])
def test_kernels_use_the_threads_of_torch_and_give_the_same_bits(kind):
    for case in (STATELESS | STATEFUL)[kind]():
        results = []
        for threads in COUNTS:
            call = case() if kind in STATEFUL else case
            torch.set_num_threads(threads)
            result, used = threads_used(call)
            assert used == threads
            results.append(tree_leaves(result))
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other))


def test_a_small_layer_wakes_no_other_thread():
    x, mask = torch.randn(60, 100, requires_grad=True), torch.rand(10, 100) < 0.05
    kept, effective = KeptLists.of(mask), torch.where(mask, torch.randn(10, 100), 0.0)
    values = effective[mask].requires_grad_()
    torch.set_num_threads(4)

    def step():
        y = ls.ops.compact_linear(x, values, kept, effective, zero=True)
        return torch.autograd.grad(y, (x, values), torch.ones(60, 10))

    _, used = threads_used(step)
    assert used == 1
