"""The CUDA kernels on a GPU: skipped without one. Their arithmetic is in test_cuda_kernels.py."""

from __future__ import annotations

import pytest
import torch
from tolerances import of_sum

import lottery_sparse as ls
from lottery_sparse import ops
from lottery_sparse.ops import dispatch
from lottery_sparse.ops.bits import reference as bits_reference
from lottery_sparse.ops.packed import formats

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and dispatch.built("cuda")),
    reason="needs a CUDA device and _C_cuda",
)

# (N, K, B): ragged, one row, several splits of K, more rows of tiles than blocks
SHAPES = [(1, 1, 1), (70, 130, 3), (33, 0, 2), (4096, 4096, 1), (300, 9000, 16), (20000, 520, 8)]
KINDS = ("ternary", "ternary by row", "csr", "bitmap")


def problem(kind, n, k, dtype, density=0.3, device="cuda"):
    """(the op with its weight bound: (x, bias) -> y, the weight in float64)."""
    generator = torch.Generator(device).manual_seed(n + k)
    drawn = torch.randn(n, k, device=device, generator=generator)
    kept = torch.rand(n, k, device=device, generator=generator) < density
    if kind.startswith("ternary"):
        signs = torch.where(kept, drawn.sign(), 0.0)
        scale = torch.ones(n if kind.endswith("row") else 1, device=device, dtype=dtype) * 0.75
        codes = formats.pack_ternary(signs)
        return (lambda x, b: ops.ternary_linear(x, codes, scale, n, b)), signs.double() * 0.75
    weight = torch.where(kept, drawn, 0.0).to(dtype)
    values, starts, columns = formats.pack_csr(weight, kept)
    if kind == "csr":
        return (lambda x, b: ops.csr_linear(x, values, starts, columns, b)), weight.double()
    bits = bits_reference.pack_mask(kept)
    return (lambda x, b: ops.bitmap_linear(x, values, starts, bits, b)), weight.double()


def assert_close(y, x, weight, bias):
    expected = x.double() @ weight.mT + bias.double()
    scale = x.double().abs() @ weight.abs().mT + bias.double().abs()
    error = (y.double() - expected).abs()
    error -= of_sum(expected, scale, x.shape[1] + 2, x.dtype)  # a bias and a scale
    assert (error <= 0).all(), float(error.max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64_and_repeats_itself(shape, kind, dtype):
    n, k, batch = shape
    op, weight = problem(kind, n, k, dtype)
    x = torch.randn(batch, k, device="cuda", dtype=dtype)
    bias = torch.randn(n, device="cuda", dtype=dtype)
    with ls.use_backend("cuda"):
        y = op(x, bias)
        assert_close(y, x, weight, bias)
        assert torch.equal(op(x, bias), y)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_x(shape, kind):
    n, k, batch = shape
    op, weight = problem(kind, n, k, torch.bfloat16)
    x, bias = torch.randn(batch, k, device="cuda"), torch.randn(n, device="cuda")
    with ls.use_backend("cuda"):
        y = op(x, bias)
    expected = x.double() @ weight.mT + bias.double()
    scale = x.double().abs() @ weight.abs().mT + bias.double().abs()
    assert ((y.double() - expected).abs() <= of_sum(expected, scale, k + 2, y.dtype)).all()


@pytest.mark.parametrize("batch", [1, 5, 16])
def test_int8_activations(batch):
    x = torch.randn(batch, 4096, device="cuda", dtype=torch.bfloat16)
    codes = formats.pack_ternary(torch.randint(-1, 2, (300, 4096), device="cuda"))
    args = x, codes, torch.rand(300, device="cuda"), None, 300, True
    y, expected = (dispatch.run_on(name, "ternary_linear", *args) for name in ("cuda", "reference"))
    assert (y - expected).float().norm() <= 0.01 * expected.float().norm()


@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["csr", "bitmap"])
@pytest.mark.parametrize("batch", [1, 4, 8, 9])
def test_densities(kind, density, batch):
    op, weight = problem(kind, 300, 700, torch.bfloat16, density)
    x = torch.randn(batch, 700, device="cuda", dtype=torch.bfloat16)
    bias = torch.zeros(300, device="cuda")
    with ls.use_backend("cuda"):
        assert_close(op(x, bias), x, weight, bias)


@pytest.mark.parametrize("kind", KINDS)
def test_graphs_and_streams(kind):
    op, weight = problem(kind, 256, 4096, torch.bfloat16)
    x = torch.randn(16, 4096, device="cuda", dtype=torch.bfloat16)
    bias = torch.zeros(256, device="cuda")
    with ls.use_backend("cuda"):
        expected = op(x, bias)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            assert torch.equal(op(x, bias), expected)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = op(x, bias)
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert_close(y, x, weight, bias)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one():
    op, weight = problem("csr", 70, 130, torch.bfloat16, device="cuda:1")
    x = torch.randn(2, 130, device="cuda:1", dtype=torch.bfloat16)
    bias = torch.zeros(70, device="cuda:1")
    with ls.use_backend("cuda"):
        assert_close(op(x, bias), x, weight, bias)
