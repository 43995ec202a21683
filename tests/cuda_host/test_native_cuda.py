"""The backend "cuda" in Python, its kernels emulated on the host: what it takes, refuses, keeps."""

from __future__ import annotations

import copy
import gc
import importlib
import sys
import types

import cuda_emulator as emulator
import pytest
import torch
from cuda_training import Rim
from tolerances import close

import lottery_sparse as ls
from lottery_sparse import ops
from lottery_sparse.ops import dispatch
from lottery_sparse.ops.bits import cuda as bits_cuda
from lottery_sparse.ops.bits import reference as bits_reference
from lottery_sparse.ops.compact import cuda as compact_cuda
from lottery_sparse.ops.packed import formats
from lottery_sparse.ops.packed import reference as packed_reference
from lottery_sparse.ops.packed.arguments import CsrArgs, TernaryArgs
from lottery_sparse.ops.steps import cuda as steps_cuda
from lottery_sparse.optim import calls

CUDA = torch.device("cuda", 0)


@pytest.fixture
def backend(monkeypatch):
    """The module as if _C_cuda were built, with the emulator behind its ops."""
    built = types.ModuleType("lottery_sparse._C_cuda")
    vars(built).update(architectures="8.0 9.0a 10.0+PTX", toolkit=13000)
    monkeypatch.setitem(sys.modules, "lottery_sparse._C_cuda", built)
    dispatch.module_of.cache_clear()
    dispatch._module.cache_clear()
    for name in ("packed", "common"):
        monkeypatch.delitem(sys.modules, f"lottery_sparse.ops.{name}.cuda", raising=False)
    module = importlib.import_module("lottery_sparse.ops.packed.cuda")
    monkeypatch.setattr(module, "_ops", types.SimpleNamespace(
        csr_linear=emulator.csr_linear,
        ternary_linear=emulator.ternary_linear,
        tiles_linear=lambda x, starts, data, bias, rows, bitmap: emulator.tiles_linear(
            bitmap, x, starts, data, bias, rows
        ),
    ))  # fmt: skip
    yield module
    for name in ("packed", "common"):
        sys.modules.pop(f"lottery_sparse.ops.{name}.cuda", None)
    dispatch.module_of.cache_clear()
    dispatch._module.cache_clear()


def problem(density=0.3, n=70, k=90, batch=9, dtype=torch.bfloat16):
    kept = torch.rand(n, k) < density
    weight = torch.where(kept, torch.randn(n, k), 0.0).to(dtype)
    return torch.randn(batch, k).to(dtype), weight, weight != 0


def arguments(op, x, weight, kept):
    values, starts, columns = formats.pack_csr(weight, kept)
    where = columns if op == "csr_linear" else bits_reference.pack_mask(kept)
    return x, values, starts, where, torch.randn(len(weight), dtype=x.dtype)


def own(op, args):
    """The arguments of a kernel."""
    return dispatch.own_arguments(op, args)


@pytest.mark.parametrize("density", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("op", ["csr_linear", "bitmap_linear"])
def test_sparse_products_are_those_of_the_reference(backend, op, density):
    args = arguments(op, *problem(density))
    expected = dispatch.run_on("reference", op, *args)
    close(getattr(backend, op)(*own(op, args)), expected)
    assert backend._tiles[args[1]][1][2] == (density > backend.MOST_PLACES)


@pytest.mark.parametrize("batch", [1, 5, 16])
@pytest.mark.parametrize("op", ["csr_linear", "bitmap_linear", "ternary_linear"])
def test_rows_of_float32_go_a_few_at_a_time(backend, op, batch):
    x, weight, kept = problem(0.1, batch=batch)
    if op == "ternary_linear":
        args = formats.pack_ternary(weight.sign()), torch.rand(1), torch.randn(70), 70, False
    else:
        args = arguments(op, x, weight, kept)[1:]
    expected = dispatch.run_on("reference", op, x.float(), *args)
    y = getattr(backend, op)(*own(op, (x.float(), *args)))
    close(y, expected)


def test_int8_rows_go_at_once(backend):
    x, weight, _ = problem(batch=16)
    codes = formats.pack_ternary(weight.sign())
    a = TernaryArgs(x.float(), codes, torch.rand(70), torch.randn(70), 70, int8=True)
    close(backend.ternary_linear(a), packed_reference.ternary_linear(a))


@pytest.mark.parametrize("density", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_few_rows_of_x_take_the_entries_as_they_are(backend, density, batch):
    a = CsrArgs(*arguments("csr_linear", *problem(density, batch=batch)))
    close(backend.csr_linear(a), packed_reference.csr_linear(a))
    assert (a.values in backend._tiles) == (density > 0.12)


def test_ternary_products_are_those_of_the_reference(backend):
    x, weight, _ = problem()
    codes, scale = formats.pack_ternary(weight.sign()), torch.rand(70) + 0.5
    a = TernaryArgs(x, codes, scale, torch.randn(70), 70, int8=False)
    close(backend.ternary_linear(a), packed_reference.ternary_linear(a))


def test_tiles_are_made_once_and_anew_after_a_write(backend):
    a = CsrArgs(*arguments("csr_linear", *problem()))
    backend.csr_linear(a)
    first = backend._tiles[a.values]
    backend.csr_linear(a)
    assert backend._tiles[a.values] is first
    a.values.mul_(2)
    close(backend.csr_linear(a), packed_reference.csr_linear(a))
    kept = len(backend._tiles)
    del a, first
    gc.collect()
    assert len(backend._tiles) == kept - 1


def test_refusals_say_what_and_why(backend):
    x, weight, kept = problem()
    a, one = CsrArgs(*arguments("csr_linear", x, weight, kept)), torch.ones(1)

    def says(text, op="csr_linear", x=x, values=a.values, scale=one):
        if op == "ternary_linear":
            why = backend.ternary_linear.why_not(TernaryArgs(x, one, scale, None, 70, False))
        else:
            why = backend.csr_linear.why_not(a._replace(x=x, values=values))
        assert text in why
        assert why.endswith(".")

    says("x as float32, float16 or bfloat16, got torch.float64", x=x.double())
    says(
        "bfloat16 ones for float32 x, got torch.float32 and torch.float32",
        x=x.float(),
        values=a.values.float(),
    )
    says("bfloat16 ones for float32 x, got torch.float16", x=x.float(), values=a.values.half())
    says("up to 16 rows of x, got 17", x=x[:1].expand(17, -1))
    says("got torch.float32 and torch.bfloat16", values=a.values.float())
    says("scale as float32, float16 or bfloat16", op="ternary_linear", scale=one.double())


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        ("8.0", (8, 0), True),
        ("8.0", (8, 9), True),
        ("8.6", (8, 0), False),
        ("8.0 9.0a", (9, 0), True),
        ("9.0a", (9, 1), False),
        ("8.0 9.0a", (10, 0), False),
        ("8.0+PTX", (12, 0), True),
        ("10.0+PTX", (9, 0), False),
    ],
)
def test_which_devices_a_build_runs_on(backend, architectures, capability, runs):
    assert dispatch.library_of("cuda").runs_on(architectures, capability) is runs


def gpu(monkeypatch, capability, driver=13000):
    """A GPU as far as torch.cuda says."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: driver, raising=False)


def test_a_device_that_it_is_not_built_for_is_named(backend, monkeypatch):
    gpu(monkeypatch, (7, 5))
    why = dispatch.library_of("cuda").fails_on(torch.device("cuda", 0))
    assert "8.0 9.0a 10.0+PTX, and cuda:0 has 7.5; set TORCH_CUDA_ARCH_LIST" in why


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_compact_model_trains_on_its_kernels(backend, name, monkeypatch):
    """Forward, backward, step and refresh of a layer, all forced, as they are on a GPU."""
    here = dispatch.Backend("lottery_sparse.ops.common.cuda", needs="torch", devices=("cpu",))
    monkeypatch.setitem(dispatch.BACKENDS, "cuda", here)
    for module in (compact_cuda, bits_cuda, steps_cuda):
        monkeypatch.setattr(module, "_ops", Rim())
    calls.op_of.cache_clear()
    first = torch.nn.Sequential(torch.nn.Linear(40, 20), torch.nn.ReLU(), torch.nn.Linear(20, 3))
    masks = {f"{i}.weight": torch.rand(first[i].weight.shape) < 0.2 for i in (0, 2)}
    models, x = [], torch.randn(9, 40)
    for forced in ("cuda", "reference"):
        model = ls.compact_(ls.set_masks_(ls.sparsify_(copy.deepcopy(first)), masks), spare=2)
        models.append(model)
        optimizer = getattr(ls.optim, name)(model.parameters(), lr=0.05, weight_decay=0.1)
        with ls.use_backend(forced):
            for _ in range(3):
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
            ls.nn.refresh_(model)
            mask = masks["0.weight"]
            assert torch.equal(ops.unpack_mask(ops.pack_mask(mask), 40), mask)
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        close(p, q)
    for i in (0, 2):
        close(*(m[i].weight_effective for m in models))
        assert (models[0][i].weight_effective != 0).equal(masks[f"{i}.weight"])
    calls.op_of.cache_clear()


def test_a_driver_of_an_older_major_version_is_named(backend, monkeypatch):
    gpu(monkeypatch, (9, 0), driver=12040)
    fails_on = dispatch.library_of("cuda").fails_on
    assert "with CUDA 13.0, and the driver is for CUDA 12.4; update" in fails_on(CUDA)
    fails_on.cache_clear()
    gpu(monkeypatch, (9, 0))
    assert fails_on(CUDA) is None


def test_forced_it_raises_and_else_it_is_left_out_and_said_once(backend, monkeypatch, caplog):
    gpu(monkeypatch, (7, 5))
    found, here = dispatch._found, {"triton": False, "lottery_sparse._C_cuda": True}
    monkeypatch.setattr(dispatch, "_found", lambda m: here[m] if m in here else found(m))
    monkeypatch.setitem(dispatch.PREFERENCE["cuda"], "csr_linear", ("cuda", "reference"))
    dispatch.fits.cache_clear()
    args = own("csr_linear", arguments("csr_linear", *problem()))
    with ls.use_backend("cuda"), pytest.raises(RuntimeError, match=r"backend cuda: .* 7\.5"):
        dispatch.kernel("csr_linear", CUDA, args)
    for _ in range(2):
        assert dispatch.kernel("csr_linear", CUDA, args) is packed_reference.csr_linear
    (record,) = caplog.records
    assert "does without its cuda kernels on cuda:0: it is built for" in record.getMessage()
    dispatch.fits.cache_clear()
