"""Compact convolutions that the CPU kernels do not take, or only just: they run all the same."""

from __future__ import annotations

import pytest
import torch
from test_compact_layers import assert_same_step, pair
from torch import nn

import lottery_sparse as ls
from lottery_sparse.ops import dispatch
from lottery_sparse.ops.compact.kept import KeptLists
from lottery_sparse.ops.masked.arguments import Geometry

if not dispatch.built("cpu"):
    pytest.skip("the native kernels (lottery_sparse._C) are not built", allow_module_level=True)
from lottery_sparse.ops.compact import cpu_conv2d as compact_cpu_conv2d
from lottery_sparse.ops.compact.arguments import CompactArgs

pytestmark = pytest.mark.numeric

# (channels in and out, kernel), options, x
TAKEN = [
    ((3, 8, (16, 2)), {"stride": (64, 2)}, (3, 3, 100, 9)),
    ((2, 4, (3, 1)), {"stride": (1, 128)}, (17, 2, 5, 300)),
    ((3, 8, 3), {"padding": 1}, (3, 3, 1, 5000)),
    ((3, 8, 3), {"padding": 1}, (2, 3, 5000, 1)),
    ((3, 8, 3), {"padding": 1}, (1, 3, 1, 1)),
    ((4, 8, 3), {"padding": 60, "dilation": 60, "groups": 2}, (1, 4, 1, 1)),
    ((4, 6, (1, 2)), {"stride": 11, "groups": 2}, (2, 4, 12, 2)),
]
STRIDES = [
    ((3, 64, 16), {"stride": 16}, (2, 3, 64, 64)),  # the patches of a vision transformer
    ((4, 8, (1, 3)), {"stride": (129, 1), "groups": 2}, (2, 4, 130, 3)),
    ((1, 2, 3), {"stride": (1, 1000), "padding": 2, "dilation": 2}, (1, 1, 1, 1)),
    ((2, 2, 12), {"stride": 12, "padding_mode": "reflect", "padding": 3}, (17, 2, 20, 24)),
]
# one pixel amid so much padding that its lines, 16 times the floats, are many, or have no numbers;
# whether the kernels could
LARGE = [
    ((1, 2, 3), {"padding": 4100, "dilation": 4100}, (1, 1, 1, 1), True),
    ((1, 2, 3), {"padding": 24000, "dilation": 24000}, (1, 1, 1, 1), False),
]


def layers(convolution, frozen="zero"):
    torch.manual_seed(0)
    channels, options = convolution
    return pair(nn.Conv2d(*channels, **options), frozen, 0.2)


def backends_of(layer, x):
    """Which backends take the forward and the backward of this layer."""
    chosen = []
    kernel = dispatch.kernel

    def note(name, device, args=()):
        found = kernel(name, device, args)
        if name.startswith("compact_conv2d"):
            chosen.append(found.__module__)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "kernel", note)
        layer(x.requires_grad_()).sum().backward()
    return chosen


CPU, DENSE = ["lottery_sparse.ops.compact.cpu_conv2d"] * 2, ["lottery_sparse.ops.compact.dense"] * 2


def trains_as_the_masked_layer(compact, plain, x):
    """Two steps, so that the weights that the dense library reads were written in between."""
    for _ in range(2):
        assert_same_step(compact, plain, x, x.numel())  # sums over all pixels
        for layer in (compact, plain):
            torch.optim.SGD(layer.parameters(), lr=0.5).step()
            layer.zero_grad()
    assert torch.equal(compact.weight_effective, compact.effective_weight)


@pytest.mark.parametrize(("channels", "options", "shape"), TAKEN, ids=str)
def test_what_kernels_only_just_take(channels, options, shape):
    plain, compact = layers((channels, options))
    x = torch.randn(shape)
    assert compact.refreshes_lazily
    assert backends_of(compact, x) == CPU
    compact.zero_grad()
    trains_as_the_masked_layer(compact, plain, x)


@pytest.mark.parametrize("frozen", ["zero", "constant"])
@pytest.mark.parametrize(("channels", "options", "shape"), STRIDES, ids=str)
def test_a_stride_that_kernels_do_not_take(channels, options, shape, frozen):
    plain, compact = layers((channels, options), frozen)
    x = torch.randn(shape)
    assert (
        not compact.refreshes_lazily
    )  # the dense library finds an effective weight that is up to date
    assert backends_of(compact, x) == DENSE
    compact.zero_grad()
    trains_as_the_masked_layer(compact, plain, x)
    with ls.use_backend("cpu"), pytest.raises(RuntimeError, match=r"strides of up to 128 pixels"):
        compact(x)


def test_a_stride_that_changes():
    plain, compact = layers(((3, 4, 3), {"stride": 2}))
    x = torch.randn(2, 3, 40, 40)
    trains_as_the_masked_layer(compact, plain, x)
    for stride in ((16, 16), (2, 2), (16, 9)):
        with torch.no_grad():
            plain.weight.add_(plain.weight_mask)
            compact.weight[: int(compact.kept.kept)] += 1
        plain.stride = compact.stride = stride
        assert compact.refreshes_lazily == (stride == (2, 2))
        trains_as_the_masked_layer(compact, plain, x)


@pytest.mark.parametrize(("channels", "options", "shape", "runs"), LARGE, ids=str)
def test_an_image_that_kernels_do_not_take(channels, options, shape, runs):
    plain, compact = layers((channels, options))
    x = torch.randn(shape)
    assert compact.refreshes_lazily  # other calls may skip what is pruned
    assert backends_of(compact, x) == DENSE
    compact.zero_grad()
    trains_as_the_masked_layer(compact, plain, x)
    if not runs:
        with ls.use_backend("cpu"), pytest.raises(RuntimeError, match="too large for its kernels"):
            compact(x)


def test_a_refused_backward():
    """Of a call whose forward another backend took."""
    _, compact = layers(((3, 8, 16), {"stride": 16}))
    y = compact(torch.randn(2, 3, 32, 32).requires_grad_())
    with ls.use_backend("cpu"), pytest.raises(RuntimeError, match=r"got \(16, 16\)\."):
        y.sum().backward()


def refusals(stride, dilation, channels=1):
    """By Python and by the kernels, of a call that has no output, so that none takes memory."""
    lists = KeptLists.of(torch.ones(channels, 9, dtype=torch.bool))
    values, effective = torch.ones(9 * channels), torch.ones(channels, 1, 3, 3)
    geometry = Geometry(stride, (0, 0), dilation, 1)
    a = CompactArgs(torch.zeros(1, 1, 1, 2), values, None, effective, lists, True, geometry)
    with pytest.raises(RuntimeError) as error:
        compact_cpu_conv2d.compact_conv2d(a)
    return compact_cpu_conv2d.why_not(a), str(error.value)


@pytest.mark.parametrize("stride", [(16, 8), (1, 128), (8, 17), (129, 1)], ids=str)
def test_the_most_stride_is_that_of_the_kernels(stride):
    why, error = refusals(stride, (1, 1))
    assert ("strides of up to" in (why or "")) == ("take a product of up to" in error)
    assert (why is None) == ("smaller than the kernel" in error)


@pytest.mark.parametrize("channels", [1, 7])
def test_the_most_lines_are_those_of_the_kernels(channels):
    """Paddings around where either begins to refuse."""
    wide = 2**20  # (1 + 3 wide + 16) lines, times as many as 32 bits count
    limit = (2**31 // channels // (18 + 3 * wide) - 17) // 3
    found = [refusals((1, 1), (limit + d, wide), channels) for d in range(-2, 4)]
    whys = [why is not None for why, _ in found]
    assert whys == ["too large" in error for _, error in found]
    assert len(set(whys)) == 2
