"""Kernels of compact convolutions against F.conv2d on the scattered weights in float64."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from native_conv2d import kept_conv2d, kept_conv2d_backward
from problems import products
from tolerances import of_sum

from lottery_sparse.ops import dispatch
from lottery_sparse.ops.compact.kept import KeptLists

if not dispatch.built("cpu"):
    pytest.skip("the native kernels (lottery_sparse._C) are not built", allow_module_level=True)

pytestmark = pytest.mark.numeric

# channels in and out, kernel, image, batch, then options
CASES = [
    ((1, 1), (1, 1), (1, 1), 1, {}),
    ((3, 5), (3, 3), (7, 9), 2, {"padding": (1, 1)}),
    ((4, 64), (3, 3), (8, 8), 17, {"padding": (1, 1)}),
    ((33, 31), (3, 3), (5, 33), 3, {"padding": (1, 1)}),
    ((18, 17), (3, 3), (16, 16), 33, {"padding": (1, 1), "stride": (2, 2)}),
    ((5, 4), (3, 3), (7, 10), 4, {"padding": (1, 1), "stride": (2, 2)}),
    ((20, 33), (1, 1), (7, 7), 16, {}),
    ((6, 9), (1, 1), (9, 8), 5, {"stride": (2, 2)}),
    ((4, 6), (3, 3), (11, 12), 2, {"padding": (1, 1), "groups": 2}),
    ((70, 70), (3, 3), (4, 4), 2, {"padding": (1, 1), "groups": 70}),
    ((6, 4), (3, 3), (9, 21), 3, {"dilation": (2, 3), "padding": (2, 3)}),
    ((6, 4), (3, 2), (9, 13), 3, {"dilation": (2, 1), "stride": (2, 3), "groups": 2}),
    ((2, 3), (5, 4), (13, 17), 2, {"padding": (3, 0), "stride": (3, 1)}),
    ((3, 2), (1, 1), (3, 4), 2, {"padding": (2, 3)}),  # dy lies beyond what dx reads
    ((2, 3), (2, 3), (9, 11), 2, {"padding": (1, 4), "stride": (4, 3)}),  # unread pixels
    ((2, 2), (3, 3), (40, 70), 1, {"padding": (1, 1), "stride": (2, 2)}),
    ((17, 2), (3, 3), (3, 200), 1, {"padding": (1, 1)}),
    ((3, 4), (3, 3), (6, 6), 0, {"padding": (1, 1)}),
]
# with few kept weights these run on planes, csrc/conv2d/sparse_conv2d_planes.h
ON_PLANES = [
    ((3, 20), (3, 3), (32, 32), 5, {"padding": (1, 1)}),
    ((1, 33), (3, 3), (28, 28), 9, {"padding": (1, 1)}),
    ((2, 9), (3, 3), (31, 33), 4, {}),
    ((3, 8), (1, 1), (30, 47), 1, {}),
    ((3, 8), (1, 1), (30, 48), 2, {"padding": (2, 3)}),  # dy lies beyond what dx reads
    ((4, 6), (3, 3), (29, 40), 2, {"padding": (1, 1), "groups": 2}),
    ((2, 8), (5, 4), (37, 65), 3, {"padding": (3, 0)}),
    ((2, 8), (3, 2), (33, 50), 3, {"padding": (2, 3), "dilation": (3, 19)}),
    ((2, 8), (3, 3), (2, 320), 3, {"padding": (1, 2)}),
    ((1, 4), (3, 3), (32, 32), 0, {"padding": (1, 1)}),
]
# the first layers of ResNets and AlexNet: few channels, large strides
STEMS = [
    ((3, 64), (7, 7), (64, 64), 3, {"padding": (3, 3), "stride": (2, 2)}),
    ((3, 64), (3, 3), (64, 64), 3, {"padding": (1, 1), "stride": (2, 2)}),
    ((3, 64), (11, 11), (64, 64), 3, {"padding": (2, 2), "stride": (4, 4)}),
]
NAMES = ["y", "dx", "dvalues", "dbias"]


def options_of(options):
    return {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1} | options


def problem(case, density, networks=None, shared=False, last=False, spare=3):
    """(arguments by name, mask [.., O, I / groups, kh, kw], dense weight)"""
    (channels, outputs), kernel, image, batch, options = case
    options = options_of(options)
    lead = () if networks is None else (networks,)
    mask = torch.rand(*lead, outputs, channels // options["groups"], *kernel) < density
    flat = mask.flatten(-3)
    lists = KeptLists.of(flat)
    lists = KeptLists.of(flat, lists.columns.shape[-1] + spare)
    values = torch.randn(lists.columns.shape)
    x = torch.randn(*(() if shared else lead), batch, channels, *image)
    y = F.conv2d(x.flatten(0, -4), torch.zeros(mask.shape[-4:]), **options)
    dy = torch.randn(*lead, batch, *y.shape[1:])
    bias = torch.randn(*lead, outputs)
    if last:
        x, dy = (t.movedim(-3, -1).contiguous().movedim(-1, -3) for t in (x, dy))
    values[..., values.shape[-1] - spare :] = torch.nan  # spare slots are never read
    return x, values, lists, bias, dy, kernel, options, mask


def run(p, needs=(True, True, True)):
    x, values, lists, bias, dy, kernel, options, _ = p
    geometry = [kernel, options["stride"], options["padding"], options["dilation"]]
    geometry.append(options["groups"])
    y = kept_conv2d(x, values, lists, bias, *geometry)
    return [y, *kept_conv2d_backward(dy, x, values, lists, *geometry, *needs)]


def scattered(values, mask):
    """Dense float64 weights; pruned entries are 0."""
    each = zip(values.view(-1, values.shape[-1]), mask.view(-1, *mask.shape[-4:]), strict=True)
    kept = torch.cat([v[: int(m.sum())] for v, m in each])
    return torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, kept.double())


def answers(x, w, bias, dy, options):
    """[y, dx, dw, dbias] by torch in float64."""
    x, w, bias = (t.double().requires_grad_() for t in (x, w, bias))
    if w.dim() == 4:
        y = F.conv2d(x, w, bias, **options)
    else:
        xs = x if x.dim() == 5 else [x] * len(w)
        each = [F.conv2d(*args, **options) for args in zip(xs, w, bias, strict=True)]
        y = torch.stack(each)
    return [y.detach(), *torch.autograd.grad(y, [x, w, bias], dy.double())]


def check(p, got):
    x, values, lists, bias, dy, _, options, mask = p
    w = scattered(values, mask)
    exact = answers(x, w, bias, dy, options)
    scale = answers(x.abs(), w.abs(), bias.abs(), dy.abs(), options)
    dvalues = got[2]
    assert dvalues.shape == values.shape
    for spare, kept in zip(
        dvalues.view(-1, dvalues.shape[-1]), lists.kept.view(-1).tolist(), strict=True
    ):
        assert (spare[kept:] == 0).all()
    got = [got[0], got[1], scattered(dvalues, mask), got[3]]
    terms = products(mask.shape, x, dy, options).values()
    exact[2], scale[2] = exact[2] * mask, scale[2] * mask
    for name, value, expected, size, n in zip(NAMES, got, exact, scale, terms, strict=True):
        assert value.shape == expected.shape, name
        error = (value.double() - expected).abs() - of_sum(expected, size, n, torch.float32)
        assert (error <= 0).all(), f"{name}: {float(error.max())} too far"


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(case, density, last):
    p = problem(case, density, last=last)
    got = run(p)
    check(p, got)
    if last:
        assert got[0].movedim(-3, -1).is_contiguous()
        assert got[1].movedim(-3, -1).is_contiguous()


@pytest.mark.parametrize("case", STEMS, ids=str)
def test_stems_match_float64(case):
    p = problem(case, 0.1)
    check(p, run(p))


@pytest.mark.parametrize("kept", [0, 1, 2])
@pytest.mark.parametrize("case", ON_PLANES, ids=str)
def test_few_kept_weights_match_float64(case, kept):
    (channels, _), kernel, _, _, options = case
    weights = channels // options.get("groups", 1) * kernel[0] * kernel[1]
    check(p := problem(case, kept / weights), run(p))
    check(p := problem(case, kept / weights, last=True), run(p))


@pytest.mark.parametrize("shared", [False, True], ids=["x each", "shared x"])
@pytest.mark.parametrize("case", [ON_PLANES[0], ON_PLANES[1], ON_PLANES[5]], ids=str)
def test_networks_that_run_on_planes_beside_others(case, shared):
    p = mixed(case, shared)
    one = run(p)
    check(p, one)
    same_bits(p, one, shared)


def mixed(case, shared):
    """Networks with many and few kept weights."""
    x, _, _, bias, dy, kernel, options, few = problem(case, 0.03, 2, shared)
    more_x, _, _, more_bias, more_dy, _, _, many = problem(case, 0.7, 2, shared)
    mask = torch.stack([many[0], few[0], few[1], many[1]])
    lists = KeptLists.of(mask.flatten(-3))
    values = torch.randn(lists.columns.shape)
    x = x if shared else torch.cat([x, more_x])
    bias, dy = torch.cat([bias, more_bias]), torch.cat([dy, more_dy])
    return x, values, lists, bias, dy, kernel, options, mask


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("shared", [False, True], ids=["x each", "shared x"])
@pytest.mark.parametrize("case", [CASES[2], CASES[5], CASES[11]], ids=str)
def test_networks_side_by_side(case, shared, last):
    p = problem(case, 0.3, networks=3, shared=shared, last=last)
    check(p, run(p))


def test_random_geometry():
    g = torch.Generator().manual_seed(0)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=g))

    for _ in range(40):
        groups = draw(1, 3)
        kernel, dilation = (draw(1, 4), draw(1, 4)), (draw(1, 3), draw(1, 3))
        padding = (draw(0, 3), draw(0, 3))
        image = [max(1, (k - 1) * d + 1 - 2 * p) + draw(0, 12)
                 for k, d, p in zip(kernel, dilation, padding, strict=True)]  # fmt: skip
        options = {"stride": (draw(1, 4), draw(1, 4)), "padding": padding, "dilation": dilation}
        channels = (groups * draw(1, 5), groups * draw(1, 5))
        case = (channels, kernel, tuple(image), draw(1, 20), options | {"groups": groups})
        networks = [None, 2][draw(0, 1)]
        p = problem(case, 0.4, networks, bool(networks and draw(0, 1)), bool(draw(0, 1)))
        check(p, run(p))


def test_wide_numbers():
    case = ((2**16 // 9 + 10, 2), (3, 3), (3, 3), 1, {"padding": (1, 1)})
    p = problem(case, 0.1)
    assert p[2].columns.dtype == torch.int32
    check(p, run(p))


@pytest.mark.parametrize(("case", "density"), [(CASES[1], 0.5), (ON_PLANES[1], 0.05)], ids=str)
def test_what_is_not_needed_is_empty(case, density):
    p = problem(case, density)
    full = run(p)
    for i in range(3):
        needs = tuple(j == i for j in range(3))
        grads = run(p, needs=needs)[1:]
        assert [grad.numel() > 0 for grad in grads] == list(needs)
        assert torch.equal(grads[i], full[1 + i])


@pytest.mark.parametrize("shared", [False, True], ids=["x each", "shared x"])
def test_the_same_bits_for_any_threads_and_beside_other_networks(shared):
    p = problem(((40, 70), (3, 3), (9, 8), 37, {"padding": (1, 1)}), 0.2, 3, shared)
    same_bits(p, run(p), shared)


def same_bits(p, one, shared):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert all(torch.equal(a, b) for a, b in zip(one, run(p), strict=True))
    finally:
        torch.set_num_threads(threads)
    x, values, lists, bias, dy, kernel, options, mask = p
    alone = (x if shared else x[1], values[1], KeptLists(*(t[1] for t in lists)), bias[1], dy[1])
    got = run((*alone, kernel, options, mask[1]))
    for name, each, single in zip(NAMES, one, got, strict=True):
        if not (shared and name == "dx"):
            assert torch.equal(each[1], single), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stride": (0, 1)}, "stride must be two integers of at least 1"),
        ({"stride": (12, 12)}, "stride is .12, 12.; the native kernels take a product of up to"),
        ({"groups": 2}, "groups is 2, which does not divide"),
        ({"dilation": (9, 9)}, "smaller than the kernel"),
    ],
)
def test_bad_options(change, message):
    x, values, lists, bias, dy, kernel, options, mask = problem(CASES[1], 0.5)
    with pytest.raises(RuntimeError, match=message):
        run((x, values, lists, bias, dy, kernel, options | change, mask))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["portable", "avx2"])
def test_every_variant(variant):
    if os.environ.get("LS_CPU"):
        pytest.skip("LS_CPU is set")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", __file__],
        env=os.environ | {"LS_CPU": variant},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:]
