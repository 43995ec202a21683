"""ternary_linear, csr_linear and bitmap_linear against dense float64 products."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from tolerances import close, of_sum

import lottery_sparse as ls
from lottery_sparse import ops
from lottery_sparse.ops import dispatch
from lottery_sparse.ops.bits import reference
from lottery_sparse.ops.packed import formats

# (N, K, B): one row, one column, no batch, K and N around blocks of 16 and sums of 512 columns,
# batches of all tile widths
SHAPES = [
    (0, 5, 2),
    (5, 0, 2),
    (1, 1, 1),
    (33, 31, 3),
    (40, 1, 2),
    (7, 9, 0),
    (130, 257, 5),
    (16, 1040, 1),
    (70, 100, 18),
    (150, 60, 33),
]
DENSITIES = [0.0, 0.05, 0.5, 1.0]
BACKENDS = dispatch.available("ternary_linear", "cpu")
KINDS = ("ternary", "ternary by row", "csr", "bitmap")

pytestmark = [pytest.mark.numeric, pytest.mark.filterwarnings("ignore:.*deterministic")]


def problem(kind, n, k, density, dtype=torch.float32):
    """(the op with its weight bound: (x, bias) -> y, the weight in float64)."""
    kept = torch.rand(n, k) < density
    if kind.startswith("ternary"):
        signs = torch.where(kept, torch.randint(0, 2, (n, k)) * 2 - 1, 0)
        scale = torch.rand(n if kind.endswith("row") else 1) + 0.5
        codes = formats.pack_ternary(signs)
        weight = scale.double().unsqueeze(1) * signs
        return (lambda x, b, **o: ops.ternary_linear(x, codes, scale, n, b, **o)), weight
    weight = torch.where(kept, torch.randn(n, k), 0.0).to(dtype)
    values, starts, columns = formats.pack_csr(weight, kept)
    if kind == "csr":
        return (lambda x, b: ops.csr_linear(x, values, starts, columns, b)), weight.double()
    bits = reference.pack_mask(kept)
    return (lambda x, b: ops.bitmap_linear(x, values, starts, bits, b)), weight.double()


def assert_close(got, x, weight, bias, terms=None):
    expected, scale = x.double() @ weight.mT, x.double().abs() @ weight.abs().mT
    if bias is not None:
        expected, scale = expected + bias.double(), scale + bias.double().abs()
    assert got.shape == expected.shape
    assert got.dtype == x.dtype
    terms = weight.shape[1] + 2 if terms is None else terms  # a bias and a scale
    error = (got.double() - expected).abs() - of_sum(expected, scale, terms, x.dtype)
    assert (error <= 0).all(), float(error.max())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("density", DENSITIES)
def test_matches_float64(backend, kind, shape, density):
    n, k, batch = shape
    op, weight = problem(kind, n, k, density)
    x, bias = torch.randn(batch, k), torch.randn(n)
    with ls.use_backend(backend):
        assert_close(op(x, bias), x, weight, bias)
        assert_close(op(x, None), x, weight, None)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the native kernels are not built")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 3])
def test_long_sums_of_one_sign_stay_accurate(kind, batch):
    op, weight = problem(kind, 4, 20000, 0.5)
    x = weight[:1].float().expand(batch, -1) + 1e-3
    with ls.use_backend("cpu"):  # sixteen sums or more side by side
        assert_close(op(x, None), x, weight, None, terms=20000 // 16)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 2, 40])
def test_bfloat16(kind, batch):
    op, weight = problem(kind, 30, 50, 0.4, torch.bfloat16)
    x, bias = torch.randn(batch, 50, dtype=torch.bfloat16), torch.randn(30, dtype=torch.bfloat16)
    for backend in BACKENDS:
        with ls.use_backend(backend):
            assert_close(op(x, bias), x, weight, bias)


@pytest.mark.parametrize("kind", KINDS)
def test_float64_runs_on_the_reference(kind):
    op, weight = problem(kind, 9, 20, 0.4)
    x = torch.randn(3, 20, dtype=torch.float64)
    assert_close(op(x, None), x, weight, None)
    if "cpu" in BACKENDS:
        with ls.use_backend("cpu"), pytest.raises(RuntimeError, match="float32, got float64"):
            op(x, None)


@pytest.mark.parametrize("kind", KINDS)
def test_any_leading_dimensions(kind):
    op, weight = problem(kind, 9, 20, 0.4)
    for lead in ((), (2, 3), (1, 2, 2), (2, 0)):
        x = torch.randn(*lead, 20)
        assert_close(op(x, None), x, weight, None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 19])
def test_the_same_bits_for_any_thread_count_and_batch(kind, batch):
    op, _ = problem(kind, 700, 90, 0.3)
    x = torch.randn(batch, 90)
    one = op(x, None)
    torch.set_num_threads(3)
    try:
        assert torch.equal(op(x, None), one)
    finally:
        torch.set_num_threads(1)
    if kind != "csr":  # one row is gathered, more are tiles
        assert torch.equal(op(x[:1], None), one[:1])


# ---- int8 activations --------------------------------------------------------------------------


def rounded(x):
    """(q, step): x ~ q · step, in float32 as the kernels do it."""
    largest = x.abs().amax(1, keepdim=True)
    q = (x * torch.where(largest > 0, 127 / largest, 0.0)).round()
    return q.double(), (largest / 127).double()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[1]], ids=str)
def test_int8_sums_are_exact(backend, kind, shape):
    n, k, batch = shape
    op, weight = problem(kind, n, k, 0.6)
    x, bias = torch.randn(batch, k), torch.randn(n)
    q, step = rounded(x)
    with ls.use_backend(backend):
        y = op(x, bias, activations="int8")
    expected = step * (q @ weight.mT) + bias
    scale = step * (q.abs() @ weight.abs().mT) + bias.abs()
    # the product with each scale is rounded once, and the bias; so is the scale of a row of x
    assert ((y - expected).abs() <= of_sum(expected, scale, 3, torch.float32)).all()


def test_int8_extremes_do_not_saturate():
    """All sums at their largest: 16-bit intermediate sums must not overflow."""
    for sign in (1, -1):
        codes = formats.pack_ternary(torch.full((17, 3000), sign))
        x = torch.ones(3, 3000)
        x[1] = -1
        y = ops.ternary_linear(x, codes, torch.ones(1), 17, activations="int8")
        assert torch.equal(y, (x.sum(1, keepdim=True) * sign).expand(3, 17))


def test_int8_rows_without_a_scale():
    """A row of zeros gives the bias; one with NaN or Inf is NaN as a whole, and the only one."""
    op, _ = problem("ternary", 20, 40, 1.0)
    x, bias = torch.randn(5, 40), torch.randn(20)
    x[1], x[2, 3], x[3, 4] = 0, torch.nan, torch.inf
    y = op(x, bias, activations="int8")
    assert torch.equal(y[1], bias)
    assert y[2:4].isnan().all()
    assert torch.equal(y[[0, 4]], op(x[[0, 4]], bias, activations="int8"))


def test_int8_rounds_each_row_by_its_own_largest():
    op, _ = problem("ternary", 50, 200, 0.5)
    x = torch.randn(3, 200) * torch.tensor([[1e-12], [1.0], [1e12]])
    exact, y = op(x, None), op(x, None, activations="int8")
    assert ((y - exact).norm(dim=1) <= 0.02 * exact.norm(dim=1)).all()


# ---- contract ----------------------------------------------------------------------------------


def test_no_gradients():
    op, _ = problem("csr", 4, 5, 0.5)
    x = torch.randn(2, 5, requires_grad=True)
    with pytest.raises(RuntimeError, match="x requires grad, but packed layers are for inference"):
        op(x, None)
    with torch.no_grad():
        assert not op(x, None).requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_one_op_in_a_compiled_graph(kind):
    op, _ = problem(kind, 9, 20, 0.4)
    x = torch.randn(3, 20)
    ops_seen = []

    def record(graph, inputs):
        ops_seen.extend(n for n in graph.graph.nodes if n.op == "call_function")
        return graph

    torch._dynamo.reset()  # or it knows from the last case that numbers may change
    compiled = torch.compile(lambda x: op(x, None), backend=record, fullgraph=True)
    assert torch.equal(compiled(x), op(x, None))
    assert len(ops_seen) == 1
    name = f"{kind.split()[0]}_linear"
    assert ops_seen[0].target is getattr(torch.ops.lottery_sparse, name).default


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast(kind, compiled):
    """x is cast as for F.linear, the weight is not: the result is that of the cast x."""
    op, _ = problem(kind, 20, 70, 0.3)
    bias = torch.randn(20)
    torch._dynamo.reset()
    call = torch.compile(op, backend="aot_eager", fullgraph=True) if compiled else op
    for shape in ((3, 70),) if compiled else ((3, 70), (70,), (2, 3, 70)):
        x = torch.randn(shape)
        with torch.autocast("cpu", torch.bfloat16):
            y, twice = call(x, bias), call(x.double(), bias)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, op(x.bfloat16(), bias))
        assert torch.equal(twice, op(x.double(), bias))
        with torch.autocast("cpu", torch.bfloat16, enabled=False):
            assert call(x, bias).dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_is_a_larger_batch(kind, capfd):
    op, _ = problem(kind, 20, 70, 0.3)
    bias, x = torch.randn(20), torch.randn(4, 3, 70)
    for dim in (0, 1, 2):
        across = torch.vmap(lambda x: op(x, bias), in_dims=dim)
        close(across(x.movedim(0, dim)), op(x, bias))
    one = torch.vmap(lambda x: op(x, bias))(x[0])
    close(one, op(x[0], bias))
    assert "performance drop" not in "".join(capfd.readouterr()), "torch would loop"


def test_vmap_over_weights():
    layers = [ls.nn.PackedLinear(torch.randn(6, 9).sign(), torch.randn(6)) for _ in range(3)]
    assert layers[0].format == "ternary"
    buffers = {
        n: torch.stack([b, *(m.get_buffer(n) for m in layers[1:])])
        for n, b in layers[0].named_buffers()
    }
    x = torch.randn(4, 9)
    call = torch.vmap(lambda b: torch.func.functional_call(layers[0], b, (x,)))
    close(call(buffers), torch.stack([layer(x) for layer in layers]))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own import
def test_forward_mode_gradients_are_an_error():
    layer = ls.nn.PackedLinear(torch.randn(6, 9).sign(), None)
    x = torch.randn(4, 9)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"x has a tangent .*was packed"):
        torch.func.jvp(layer, (x,), (x,))


BAD = {
    "x": (lambda: ops.csr_linear(torch.ones(2, 3).long(), *csr()), "x must be a floating"),
    "activations": (lambda: ternary(activations="int4"), 'activations must be "exact" or "int8"'),
    "codes": (lambda: ternary(codes=torch.zeros(1, 2, 16)), r"codes must be int32 \(1, 1, 16\)"),
    "scale": (lambda: ternary(scale=torch.ones(3)), r"scale must be one floating number"),
    "bias": (lambda: ternary(bias=torch.ones(3)), r"bias must be floating \[4\]"),
    "values": (lambda: ops.csr_linear(torch.ones(2, 3), torch.ones(2, 3), *csr()[1:]), "values mu"),
    "starts": (lambda: ops.csr_linear(torch.ones(2, 3), csr()[0], csr()[2], csr()[2]), "starts mu"),
    "columns": (lambda: ops.csr_linear(torch.ones(2, 3), *csr()[:2], csr()[1]), "columns must be"),
    "bits": (lambda: ops.bitmap_linear(torch.ones(2, 3), *csr()[:2], csr()[1]), "bits must be"),
}


def csr():
    return formats.pack_csr(torch.ones(4, 3), torch.ones(4, 3, dtype=torch.bool))


def ternary(**change):
    arguments = {"x": torch.ones(2, 3), "codes": formats.pack_ternary(torch.ones(4, 3))}
    arguments |= {"scale": torch.ones(1), "rows": 4}
    return ops.ternary_linear(**{**arguments, **change})


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


# ---- every CPU variant -------------------------------------------------------------------------


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the native kernels are not built")
def test_int8_gives_the_same_bits_in_every_cpu_variant():
    code = (
        "import torch, hashlib; from lottery_sparse import ops\n"
        "from lottery_sparse.ops.packed import formats\n"
        "g = torch.Generator().manual_seed(1); h = hashlib.sha256()\n"
        "for n, k, b in ((33, 31, 3), (130, 700, 21), (5, 64, 1), (64, 100, 8)):\n"
        "    codes = formats.pack_ternary(torch.randint(-1, 2, (n, k), generator=g))\n"
        "    x, c = torch.randn(b, k, generator=g), torch.rand(n, generator=g)\n"
        "    y = ops.ternary_linear(x, codes, c, n, c, activations='int8')\n"
        "    h.update(y.numpy().tobytes())\n"
        "print(h.hexdigest())"
    )
    host = pytest.importorskip("lottery_sparse._host", exc_type=ImportError)
    variants = host.build_info()["variants_usable"]
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"LS_CPU": variant},
            text=True,
            capture_output=True,
            check=True,
        )
        for variant in variants
    ]
    assert len({run.stdout for run in runs}) == 1
