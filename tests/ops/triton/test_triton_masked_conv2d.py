"""The convolution kernels of Triton against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compact_problems import Arguments
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import FROZEN, NETWORKS, SMALL, check, conv_case, conv_problem

import lottery_sparse as ls
from lottery_sparse.ops.compact.kept import KeptLists
from lottery_sparse.ops.masked import triton_conv2d
from lottery_sparse.ops.masked.arguments import Geometry, MaskedArgs
from lottery_sparse.ops.triton import conv_tiles, tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# every source of frozen values with every form of x in float32; each once in the others
COMBINATIONS = [(n, f, torch.float32) for n in NETWORKS for f in FROZEN] + [
    (n, f, dtype)
    for n, f in zip(NETWORKS, FROZEN, strict=True)
    for dtype in (torch.float16, torch.bfloat16)
]
# (channels in and out, kernel, image) and options
GEOMETRIES = {
    "one of everything": (((1, 1), (1, 1), (1, 1)), {}),
    "more than a word of columns": (((33, 3), (1, 1), (4, 5)), {}),
    "uneven": (((3, 4), (3, 2), (7, 6)), {"stride": (2, 1), "padding": (0, 2)}),
    "dilation": (((2, 3), (2, 3), (7, 8)), {"dilation": (3, 2), "padding": 1}),
    "stride and dilation, 2 in common": (
        ((2, 3), (3, 2), (9, 8)),
        {"stride": (4, 2), "dilation": (2, 2), "padding": 2},
    ),
    "unread pixels": (((2, 3), (1, 2), (7, 9)), {"stride": (3, 4)}),
    "dy beyond what dx reads": (((2, 3), (1, 1), (3, 4)), {"padding": (2, 3)}),
    "two groups": (((4, 6), (2, 2), (5, 4)), {"groups": 2, "padding": 1, "stride": 2}),
    "depthwise": (((3, 6), (2, 1), (4, 4)), {"groups": 3}),
    "kernel as large as the image": (((3, 2), (3, 2), (3, 2)), {}),
    "no batch": (SMALL, {"batch": 0}),
    "several tiles of pixels, several parts of dw": (((3, 5), (1, 1), (11, 10)), {"batch": 12}),
    "several tiles of channels": (((68, 70), (1, 1), (2, 3)), {}),
}


def verify(p, note=""):
    p = p.to(DEVICE)
    with ls.use_backend("triton"):
        check(p, p.run(), note)


@pytest.mark.parametrize(("networks", "frozen", "dtype"), COMBINATIONS, ids=str)
def test_matches_float64(networks, frozen, dtype):
    p = conv_case(((5, 6), (2, 1), (4, 3)), {"padding": 1}, 0.5, frozen, networks, dtype).to(DEVICE)
    packed = p.packed
    with ls.use_backend("triton"):
        got, again = p.run(), p.run(packed)
    check(p, got)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.parametrize(("shapes", "options"), GEOMETRIES.values(), ids=GEOMETRIES)
def test_geometries(shapes, options):
    verify(conv_case(shapes, options, 0.5, "tensor"))


def test_groups_of_several_networks():
    options = {"groups": 2, "padding": 1, "stride": 2}
    for networks, frozen in (("networks", "sign x constant"), ("shared x", "tensor")):
        verify(conv_case(((4, 6), (2, 1), (3, 4)), options, 0.5, frozen, networks))


@pytest.mark.parametrize("density", [0.0, 0.03, 1.0])
def test_densities(density):
    verify(conv_case(SMALL, {}, density, "sign x constant"))


@settings(max_examples=5)
@given(
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    groups=st.integers(1, 2),
    kernel=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    beyond=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
)
def test_any_geometry(channels, groups, kernel, beyond, stride, padding, dilation):
    image = [d * (k - 1) + 1 + b for d, k, b in zip(dilation, kernel, beyond, strict=True)]
    shapes = tuple(groups * c for c in channels), kernel, tuple(image)
    options = {"groups": groups, "stride": stride, "padding": padding, "dilation": dilation}
    verify(conv_case(shapes, options), f"{options}")


# (channels in and out, kernel, image): depths of 64, of 16 with a rest, of 32
@pytest.mark.parametrize(
    "shapes",
    [((64, 66), (1, 1), (9, 15)), ((66, 64), (1, 2), (9, 16)), ((32, 66), (2, 1), (10, 15))],
    ids=str,
)
def test_tiles_of_every_size(shapes, monkeypatch):
    monkeypatch.setattr(tiles, "MULTIPROCESSORS", 1)  # or small problems would take small ones
    verify(conv_case(shapes, {}, 0.5, "zero", "single", torch.float16))


def test_sizes_of_tiles():
    size = conv_tiles.pixel_tile(torch.bfloat16, 128, 2**18, 1)
    assert (size["ROWS"], size["BATCH"]) == (128, 256)
    assert conv_tiles.pixel_tile(torch.bfloat16, 64, 2**18, 1)["ROWS"] == 64
    assert conv_tiles.pixel_tile(torch.bfloat16, 128, 512, 1)["BATCH"] == 64
    depths = [conv_tiles.depth_of(64, channels) for channels in (1, 16, 20, 32, 48, 66, 96, 128)]
    assert depths == [16, 16, 32, 32, 16, 16, 32, 64]


# ---- memory layouts ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("which", [("x",), ("weight", "mask"), ("x", "weight", "mask", "dy")])
def test_channels_last(which, dtype):
    p = conv_case(((9, 10), (2, 1), (4, 5)), {"padding": 1}, dtype=dtype).to(DEVICE)
    p = replace(p, **{n: getattr(p, n).to(memory_format=torch.channels_last) for n in which})
    verify(p, f"with {which} channels last")
    with ls.use_backend("triton"):
        y = ls.ops.masked_conv2d(p.x, p.weight, p.mask, p.bias, **p.options)
    assert y.is_contiguous(memory_format=torch.channels_last)  # as F.conv2d


@pytest.mark.parametrize("networks", ["single", "networks"])
def test_any_strides(networks):
    p = conv_case(((2, 2), (1, 2), (3, 4)), {"padding": 1}, 0.5, "zero", networks).to(DEVICE)
    names = ("x", "weight", "mask", "dy")
    verify(replace(p, **{n: getattr(p, n).mT.contiguous().mT for n in names}))
    verify(replace(p, **{n: getattr(p, n).repeat_interleave(2, -1)[..., ::2] for n in names}))
    verify(replace(p, dy=p.dy[..., :1, :1].expand_as(p.dy)))


# ---- refusals, and the compact layer's product -----------------------------------------------


def test_what_is_too_large_is_refused():
    def why(x, weight, stride=1, groups=1):
        x, weight = torch.empty(x, device="meta"), torch.empty(weight, device="meta")
        geometry = Geometry([stride] * 2, [0, 0], [1, 1], groups)
        return triton_conv2d.why_not(MaskedArgs(x, weight, weight > 0, geometry=geometry))

    assert why((256, 128, 32, 32), (128, 128, 3, 3)) is None
    assert why((256, 64, 224, 224), (64, 64, 3, 3)) is None
    assert "up to 1500 rows and columns, got 1501" in str(why((1, 1, 9, 1501), (1, 1, 3, 3)))
    assert "pixels in all" in str(why((2**16, 1, 200, 200), (1, 1, 1, 1)))
    assert "numbers in a tile's reach" in str(why((2, 2**10, 1500, 1500), (1, 2**10, 1, 1)))
    assert "got 70000, 1 and 1" in str(why((1, 70000, 2, 2), (70000, 1, 1, 1), 1, 70000))


@pytest.mark.parametrize("image", [(1, 90), (75, 2)], ids=str)
def test_images_of_any_proportions(image):
    verify(conv_case(((1, 2), (1, 1), image), {"padding": (1, 0)}))


def test_compact_conv2d():
    for networks in ("single", "shared x"):
        p = conv_problem(
            (4, 6), (2, 3), (5, 4), 2, 0.3, "tensor", *NETWORKS[networks], groups=2, padding=1
        )
        a = Arguments.of(p)
        moved = {n: getattr(a, n).to(DEVICE) for n in ("values", "effective")}
        a = replace(
            a, problem=p.to(DEVICE), kept=KeptLists(*(t.to(DEVICE) for t in a.kept)), **moved
        )
        with ls.use_backend("triton"):
            check(p, a.run())
