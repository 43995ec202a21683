"""NaN and Inf in x and dy go where F.linear on the effective weight lets them, on every backend.

A pruned weight is zero, and zero times NaN or Inf is NaN: kernels that skip zeros say so too.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import lottery_sparse as ls
from lottery_sparse.ops import compact_linear, dispatch, masked_linear
from lottery_sparse.ops.compact.kept import KeptLists
from lottery_sparse.ops.packed import formats
from lottery_sparse.ops.packed.op import bitmap_linear, csr_linear, ternary_linear

BATCH, K, N = 37, 70, 33
BAD = [float("nan"), float("inf"), -float("inf")]
BACKENDS = ["reference", "dense", *(["cpu"] if dispatch.built("cpu") else [])]
EMPTY, FULL, MIXED = 5, 6, 7  # columns that no row keeps, that all keep, that some keep


def problem(networks: int | None = None, shared: bool = False, dtype=torch.float32):
    """x, weight, mask, bias; rows 1, 2, ... of x each hold a NaN or Inf, the last ones two."""
    generator = torch.Generator().manual_seed(0)
    e = () if networks is None else (networks,)
    weight = torch.randn(*e, N, K, generator=generator).to(dtype)
    mask = torch.rand(*e, N, K, generator=generator) < 0.2
    mask[..., EMPTY], mask[..., FULL] = False, True
    mask[..., : N // 2, MIXED], mask[..., N // 2 :, MIXED] = True, False
    x = torch.randn(*(() if shared else e), BATCH, K, generator=generator).to(dtype)
    bias = torch.randn(*e, N, generator=generator).to(dtype)
    spoil(x, (EMPTY, FULL, MIXED))
    return x, weight, mask, bias


def spoil(x: Tensor, columns: tuple[int, ...]) -> None:
    for i, column in enumerate(columns):
        for j, bad in enumerate(BAD):
            x[..., 1 + 3 * i + j, column] = bad
    x[..., BATCH - 2, columns[:2]] = float("inf")
    x[..., BATCH - 1, columns[1:]] = torch.tensor([float("inf"), -float("inf")], dtype=x.dtype)


def pattern(t: Tensor) -> Tensor:
    return torch.where(t.isnan(), 2.0, torch.where(t.isinf(), t.sign().float(), 0.0))


def assert_like(found: list[Tensor], wanted: list[Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(pattern(one), pattern(other))
    assert any(pattern(t).any() for t in wanted)
    assert not all(pattern(t).all() for t in wanted)


def gradients(y: Tensor, inputs: list[Tensor], bad_dy: bool) -> list[Tensor]:
    dy = torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(y.dtype)
    if bad_dy:
        spoil(dy, (0, 1, N - 1))
    return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


FORMS = [(None, False), (3, False), (3, True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("networks", "shared"), FORMS)
@pytest.mark.parametrize("bad_dy", [False, True])
@pytest.mark.parametrize("name", BACKENDS)
def test_masked_linear(name, networks, shared, bad_dy, dtype):
    x, weight, mask, bias = problem(networks, shared, dtype)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]

    def run() -> list[Tensor]:
        return gradients(masked_linear(x, weight, mask, bias), inputs, bad_dy)

    effective = torch.where(mask, weight, 0.0).to(dtype)
    y = x @ effective.mT + bias.unsqueeze(-2)
    wanted = gradients(y, inputs, bad_dy)
    with ls.use_backend(name):
        found = run()
    assert (found[2][~mask] == 0).all()  # pruned entries get no gradient, NaN or not
    for t in (found[2], wanted[2]):
        t[~mask] = 0
    assert_like(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("networks", "shared"), FORMS)
@pytest.mark.parametrize("bad_dy", [False, True])
@pytest.mark.parametrize("name", [*BACKENDS, None])
def test_compact_linear(name, networks, shared, bad_dy, dtype):
    x, weight, mask, bias = problem(networks, shared, dtype)
    kept = KeptLists.of(mask)
    values = torch.zeros(kept.columns.shape, dtype=dtype)
    each = [(values, weight, mask)] if networks is None else zip(values, weight, mask, strict=True)
    for v, w, m in each:
        v[: int(m.sum())] = w[m]
    effective = torch.where(mask, weight, 0.0).to(dtype)
    inputs = [t.requires_grad_() for t in (x, values, bias)]

    def run() -> list[Tensor]:
        y = compact_linear(x, values, kept, effective, bias, zero=True)
        return gradients(y, inputs, bad_dy)

    with ls.use_backend("reference"):
        wanted = run()
    if name is None:
        found = run()
    else:
        with ls.use_backend(name):
            found = run()
    assert_like(found, wanted)


@pytest.mark.parametrize("rows", [BATCH, 1, 2])
@pytest.mark.parametrize("name", [n for n in BACKENDS if n != "dense"])
def test_packed(name, rows):
    x, weight, mask, bias = problem()
    x, weight = x[-rows:], torch.where(mask, weight, 0.0)
    csr, bits = formats.pack_csr(weight, mask), ls.ops.pack_mask(mask)
    with ls.use_backend(name):
        found = {
            "csr": csr_linear(x, *csr, bias),
            "bitmap": bitmap_linear(x, *csr[:2], bits, bias),
            "ternary": ternary_linear(
                x, formats.pack_ternary(weight.sign().to(torch.int8)), torch.ones(1), N, bias
            ),
        }
    for kind, y in found.items():
        w = weight.sign() if kind == "ternary" else weight
        wanted = pattern(torch.nn.functional.linear(x, w, bias))
        assert wanted.any()
        assert torch.equal(pattern(y), wanted), kind


@pytest.mark.skipif(not dispatch.built("cpu"), reason="the native kernels are not built")
@pytest.mark.parametrize("density", [0.2, 0.9])
@pytest.mark.parametrize("bad", BAD)
def test_train_step(bad, density):
    def network():
        torch.manual_seed(0)
        made = ls.sparsify_(nn.Sequential(nn.Linear(K, N), nn.ReLU(), nn.Linear(N, 5)))
        masks = {n: torch.rand(m.shape) < density for n, m in ls.masks_of(made).items()}
        masks["0.weight"][:, EMPTY] = False
        masks["2.weight"][:, 3] = False  # a hidden unit that nobody reads
        ls.set_masks_(made, masks)
        return ls.compact_(made)

    x, y = torch.randn(BATCH, K, generator=torch.Generator().manual_seed(0)), torch.arange(BATCH)
    x[2, EMPTY] = bad
    x[33, FULL] = bad
    made, modules = network(), network()
    loss = ls.train_step(made, torch.optim.SGD(made.parameters(), lr=0.1))(x, y % 5)
    optimizer = torch.optim.SGD(modules.parameters(), lr=0.1)
    with ls.use_backend("reference"):
        wanted = nn.functional.cross_entropy(modules(x), y % 5)
        wanted.backward()
    optimizer.step()
    assert wanted.isnan()
    assert loss.isnan().all()
    for one, other in zip(made.parameters(), modules.parameters(), strict=True):
        assert torch.equal(pattern(one.detach()), pattern(other.detach()))


@pytest.mark.skipif(not dispatch.built("cpu"), reason="the native kernels are not built")
def test_finite_rows_keep_their_bits():
    x, weight, mask, bias = problem()
    whole = x.isfinite().all(-1)
    with ls.use_backend("cpu"):
        y = masked_linear(x, weight, mask, bias)
        clean = masked_linear(torch.where(x.isfinite(), x, 0.0), weight, mask, bias)
    assert whole.sum() > BATCH // 2
    assert torch.equal(y[whole], clean[whole])


@pytest.mark.skipif(not dispatch.built("cpu"), reason="the native kernels are not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", [0, 1, 63, 64, 1000, BATCH * K - 1])
@pytest.mark.parametrize("bad", BAD)
def test_every_place_is_looked_at(place, bad, dtype):
    x, weight = torch.ones(BATCH, K, dtype=dtype), torch.ones(N, K, dtype=dtype)
    x.view(-1)[place] = bad
    with ls.use_backend("cpu"):
        y = masked_linear(x, weight, torch.zeros(N, K, dtype=torch.bool))
    assert torch.equal(y.isnan().any(-1), ~x.isfinite().all(-1))
    assert y.isnan().any(-1).equal(y.isnan().all(-1))


def test_large_numbers_are_no_infinities():
    x, weight = torch.full((BATCH, K), 1e30), torch.full((N, K), 1e-3)
    mask = torch.arange(K).expand(N, K) % 3 == 0
    for name in BACKENDS:
        with ls.use_backend(name):
            assert masked_linear(x, weight, mask).isfinite().all(), name


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [5, 14], ids=["planes", "tiles"])
@pytest.mark.parametrize("bad", BAD)
def test_compact_convolutions(size, layout, bad):
    generator = torch.Generator().manual_seed(0)
    layer = nn.Conv2d(3, 8, 3, padding=1)
    ls.sparsify_(layer)
    mask = torch.rand(layer.weight.shape, generator=generator) < 0.1
    ls.set_masks_(layer, {"weight": mask})
    x = torch.randn(6, 3, size, size, generator=generator).contiguous(memory_format=layout)
    x[1, 0, 0, 0] = bad
    x[2, 2, size // 2, size // 2] = bad
    dy = torch.randn(6, 8, size, size, generator=generator)
    dy[3, 1, size - 1, 0] = bad
    dense = nn.Conv2d(3, 8, 3, padding=1)
    dense.load_state_dict(ls.dense_state_dict(layer))
    found = []
    for each in (dense, layer, ls.compact_(copy.deepcopy(layer))):
        inputs = x.detach().clone().requires_grad_()
        y = each(inputs)
        y.backward(dy)
        gradient = each.weight.grad
        if gradient.dim() == 1:
            gradient = torch.zeros(mask.shape).masked_scatter_(mask, gradient)
        found.append([y.detach(), inputs.grad, torch.where(mask, gradient, 0.0)])
    for other in found[1:]:
        assert_like(other, found[0])
