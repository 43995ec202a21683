"""Which backend runs: the table, forcing one, and a machine where nothing is built."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import threading

import pytest
import torch
from problems import DTYPES, FROZEN, linear_problem, takes

import lottery_sparse as ls
from lottery_sparse import ops
from lottery_sparse.ops import dispatch
from lottery_sparse.ops.compact import reference as compact_reference
from lottery_sparse.ops.masked import reference as masked_reference
from lottery_sparse.ops.masked.arguments import MaskedArgs
from lottery_sparse.ops.selection import reference as selection_reference
from lottery_sparse.tools import doctor

CPU = torch.device("cpu")
ONE = torch.ones(1, 1, 1, 1).bool()
OPS = [name for preferred in dispatch.PREFERENCE.values() for name in preferred]

native_only = pytest.mark.skipif(
    importlib.util.find_spec("lottery_sparse._C") is None,
    reason="the native kernels (lottery_sparse._C) are not built",
)


def arguments(p):
    return (MaskedArgs(p.x, p.weight, p.mask, p.bias, p.frozen),)


# ---- the tables ------------------------------------------------------------------------------


def test_tables_name_only_what_exists():
    for device, preferred in dispatch.PREFERENCE.items():
        for op, names in preferred.items():
            assert dispatch.module_of(op, "reference"), f"{op} has no definition"
            for name in names:
                backend = dispatch.BACKENDS[name]
                assert not backend.devices or device in backend.devices
                if dispatch.built(name):
                    assert dispatch.module_of(op, name), f"{name} has no {op}"


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_a_reference_everywhere(op):
    assert dispatch.available(op, "cpu")[0] == "reference"
    assert dispatch.kernel(op, torch.device("meta")) is dispatch.function(op, "reference")


def test_the_doctor_has_a_case_of_every_op_that_is_listed():
    listed = {op for ops in dispatch.PREFERENCE.values() for op in ops}
    assert listed <= set(doctor.cases("cpu"))


def test_what_is_not_listed_runs_on_the_reference():
    assert "gather_kept" not in dispatch.PREFERENCE["cpu"]
    assert dispatch.kernel("gather_kept", CPU) is compact_reference.gather_kept


@native_only
def test_a_refused_call_goes_to_the_next_backend():
    for frozen in FROZEN[:2]:
        for dtype in (*DTYPES, torch.float64):
            args = arguments(linear_problem(3, 4, 2, 0.5, frozen, dtype=dtype))
            chosen = dispatch.kernel("masked_linear", CPU, args).__module__
            if not takes("cpu", "masked_linear", frozen, dtype):
                assert chosen == "lottery_sparse.ops.masked.dense"


# ---- forcing one -----------------------------------------------------------------------------


def test_a_forced_backend_runs(monkeypatch):
    with ls.use_backend("reference"):
        assert dispatch.kernel("masked_linear", CPU) is masked_reference.masked_linear
        with ls.use_backend("dense"):  # the innermost counts
            chosen = dispatch.kernel("masked_linear", CPU)
            assert chosen.__module__ == "lottery_sparse.ops.masked.dense"
        assert dispatch.forced() == "reference"
    assert dispatch.forced() is None
    monkeypatch.setenv("LS_BACKEND", "reference")
    assert dispatch.kernel("keep_top", CPU) is selection_reference.keep_top
    with ls.use_backend("dense"):  # code knows better than the environment
        assert dispatch.forced() == "dense"
    monkeypatch.setenv("LS_BACKEND", "")
    assert dispatch.forced() is None


def test_a_backend_is_forced_no_longer_after_an_error():
    with pytest.raises(KeyError), ls.use_backend("reference"):
        raise KeyError
    assert dispatch.forced() is None


def test_blocks_may_be_left_in_any_order():
    outer, inner, again = (ls.use_backend(name) for name in ("reference", "dense", "reference"))
    outer.__enter__()
    inner.__enter__()
    again.__enter__()
    assert dispatch.forced() == "reference"
    outer.__exit__(None, None, None)
    assert dispatch.forced() == "reference"  # of `again`
    again.__exit__(None, None, None)
    assert dispatch.forced() == "dense"
    inner.__exit__(None, None, None)
    assert dispatch.forced() is None


def test_generators_force_each_their_own_backend_until_they_end():
    def steps(name):
        with ls.use_backend(name):
            yield dispatch.forced()
            yield dispatch.forced()

    first, second = steps("reference"), steps("dense")
    assert (next(first), next(second)) == ("reference", "dense")
    first.close()
    assert dispatch.forced() == "dense"
    second.close()
    assert dispatch.forced() is None


def test_a_backend_is_forced_in_every_thread():
    # the backward of CUDA tensors runs on threads of autograd's own
    seen = []
    with ls.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(dispatch.forced()))
        thread.start()
        thread.join()
    assert seen == ["reference"]


def test_unknown_names_list_the_known_ones(monkeypatch):
    known = "backend must be one of reference, dense, cpu, triton, cuda, got 'cuda13'"
    with pytest.raises(ValueError, match=known), ls.use_backend("cuda13"):
        pass
    monkeypatch.setenv("LS_BACKEND", "cuda13")
    with pytest.raises(ValueError, match=known):
        ls.random.words(3, 0)


def test_a_forced_backend_without_the_op_fails():
    with (
        ls.use_backend("dense"),
        pytest.raises(RuntimeError, match=r"keep_top has no dense backend for cpu tensors; av"),
    ):
        ops.keep_top(torch.zeros(3), torch.ones(3).bool(), 1)


@native_only
def test_a_forced_backend_fails_where_it_would_fall_back():
    with ls.use_backend("cpu"):
        with pytest.raises(
            RuntimeError, match=r"masked_conv2d has no cpu backend.*reference, dense"
        ):
            ops.masked_conv2d(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 1, 1), ONE)
        with pytest.raises(RuntimeError, match="keep_top has no cpu backend for cuda tensors"):
            dispatch.kernel("keep_top", torch.device("cuda"))
        with pytest.raises(RuntimeError, match=r"keep_top cannot run on .* cpu: .*float64"):
            ops.keep_top(torch.zeros(3).double(), torch.ones(3).bool(), 1)
        for frozen in FROZEN:
            for dtype in (*DTYPES, torch.float64):
                p = linear_problem(3, 4, 2, 0.5, frozen, dtype=dtype)
                if takes("cpu", "masked_linear", frozen, dtype):
                    p.run()
                    continue
                why = "frozen values" if frozen != "zero" else str(dtype)
                with pytest.raises(RuntimeError, match=f"forced backend cpu: .*{why}"):
                    p.run()


@native_only
def test_the_backward_is_forced_like_the_forward():
    p = linear_problem(3, 4, 2, 0.5, dtype=torch.float64)
    x = p.x.requires_grad_()
    y = ops.masked_linear(x, p.weight, p.mask)
    with ls.use_backend("cpu"), pytest.raises(RuntimeError, match="masked_linear_backward cannot"):
        y.backward(p.dy)


# ---- a machine where nothing is built --------------------------------------------------------

# None in sys.modules hides a module from find_spec and from import
HIDDEN = "import sys; sys.modules.update({'lottery_sparse._C': None, 'lottery_sparse._host': None})"
WITHOUT_KERNELS = f"""
{HIDDEN}
import torch
import lottery_sparse as ls
print("imported", flush=True)
weight = torch.arange(12.0).view(3, 4).requires_grad_()
mask = ls.ops.keep_top(weight.detach(), torch.ones(3, 4).bool(), 6)
ls.ops.masked_linear(torch.ones(2, 4), weight, mask).sum().backward()
print(weight.grad.tolist(), ls.random.words(1, 0).item() & 0xFFFFFFFF)
assert torch.equal(ls.ops.unpack_mask(ls.ops.pack_mask(mask), 4), mask)
try:
    with ls.use_backend("cpu"):
        ls.ops.pack_mask(mask)
except RuntimeError as error:
    print(error)
"""


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        text=True,
        capture_output=True,
    )


def test_without_kernels_everything_runs_and_one_line_says_so():
    done = run_python(WITHOUT_KERNELS)
    assert done.returncode == 0, done.stderr
    imported, values, error = done.stdout.splitlines()
    assert imported == "imported"
    assert values == f"{[[0.0] * 4, [0.0, 0.0, 2.0, 2.0], [2.0] * 4]} {0x6627E8D5}"
    assert error == (
        "pack_mask has no cpu backend for cpu tensors (lottery_sparse._C is not installed); "
        "available here: reference."
    )
    (line,) = done.stderr.splitlines()  # once, for all five ops
    assert "lottery_sparse runs in pure Python" in line
    assert "pip install --no-build-isolation ." in line


def test_the_doctor_takes_steps_beside_torch(monkeypatch):
    found = doctor.report()
    assert found["healthy"]
    names = {f"optim.{name}" for name in ("SGD", "Adam", "AdamW")}
    if dispatch.built("cpu"):
        names |= {f"train_step, {name}" for name in ("SGD", "Adam", "AdamW")}
    assert found["steps"]["cpu"] == dict.fromkeys(names, "ok")

    ours, theirs, options = doctor.OPTIMIZERS["Adam"]

    def wrong(parameters, lr):
        return ours(parameters, lr=1.1 * lr)

    monkeypatch.setitem(doctor.OPTIMIZERS, "Adam", (wrong, theirs, options))
    found = doctor.report()
    assert not found["healthy"]
    failed = {name for name, said in found["steps"]["cpu"].items() if said.startswith("FAILED: ")}
    assert failed == {name for name in names if name.endswith(" Adam") or name == "optim.Adam"}


@pytest.mark.parametrize("backend", ["reference", "dense"])
def test_steps_that_a_forced_backend_does_not_take_are_not_failures(backend):
    with ls.use_backend(backend):
        found = doctor.steps("cpu")
    assert set(found.values()) == {"ok"}


def test_without_triton_its_remedy_is_triton(caplog, monkeypatch):
    found = dispatch._found
    monkeypatch.setattr(dispatch, "_found", lambda module: module != "triton" and found(module))
    dispatch._say_not_built.cache_clear()
    with caplog.at_level("WARNING", logger="lottery_sparse"):
        for _ in range(2):
            dispatch.kernel("ternary_linear", torch.device("cuda"))
    dispatch._say_not_built.cache_clear()
    said = [record.getMessage() for record in caplog.records]
    assert [line for line in said if "Triton" in line] == [
        "lottery_sparse runs without its Triton kernels: pip install triton."
    ]


@pytest.mark.skipif(not dispatch.built("cpu"), reason="the native kernels are not built")
def test_the_doctor_says_that_the_node_is_of_another_torch(monkeypatch):
    assert doctor.native_line().endswith(".")
    monkeypatch.setattr(torch, "__version__", "2.99.0+cpu")
    assert re.search(r"node .* is not built for torch 2\.99\.0\+cpu; run ", doctor.native_line())
    assert doctor.report()["native"]["_eager_2_99_0"]["state"] == "missing"


def test_the_environment_forces_too():
    code = f"{HIDDEN}; import lottery_sparse as ls; ls.random.words(1, 0)"
    done = run_python(code, LS_BACKEND="cpu")
    assert done.returncode != 0
    assert "random_words has no cpu backend" in done.stderr
    done = run_python(code, LS_BACKEND="reference")
    assert (done.returncode, done.stderr) == (0, "")


def test_the_compiler_is_not_imported_before_it_is_used():
    code = "import sys, lottery_sparse; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True)
    assert done.stdout.strip() == "False"
