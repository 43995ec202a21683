"""What a run says of its arithmetic computes it, or the process is refused."""

import json
import os
import subprocess
import sys
from functools import partial

import pytest

import lottery_sparse as ls
from experiments.__main__ import main
from experiments.store import arithmetic, machine
from experiments.store.remakes import readable
from experiments.store.store import Store
from experiments.study import runs
from experiments.study.networks import NETWORKS
from experiments.study.runs import LITERALS, Run
from experiments.train import models
from lottery_sparse.nn.compact.base import Compact
from lottery_sparse.ops import dispatch, limits
from lottery_sparse.ops.common.eager import has_node
from lottery_sparse.tickets.round import Began

SMOKE = partial(Run, network="fc", profile="smoke", seed=0)
needs_kernels = pytest.mark.skipif(
    not (dispatch.built("cpu") and has_node()), reason="the kernels are not built"
)


def command(folder, *more: str) -> list[str]:
    return [
        "run", "dense", "--profile", "smoke", "--seeds", "1", "--engine", "inline",
        "--store", f"{folder}", *more,
    ]  # fmt: skip


# literals of a config


def test_defaults_leave_ids_alone_and_other_values_do_not():
    assert SMOKE().id == "fc-large_final-s0-smoke-b722dcd5acb1"
    for change in ({"numerics": -1}, {"numerics": 0}, {"remake": 1}, {"remake": 2}):
        other = SMOKE(**change)
        ((name, value),) = change.items()
        assert f"-{name}_{value}-" in other.id
        assert getattr(other.dense, name) == value
        assert other.named == SMOKE().named | change
        assert runs.run_of(json.loads(json.dumps(other.named))) == other


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"numerics": 2}, "numerics must be one of 1, -1, 0; got 2"),
        ({"precision": "float16"}, "precision must be one of float32, bfloat16; got 'float16'"),
        ({"layout": "blocked"}, "layout must be one of contiguous, channels_last; got"),
        ({"form": "packed"}, "form must be one of compact, masked; got 'packed'"),
        ({"layout": "channels_last"}, "fc has no convolutions, .* got float32, channels_last and"),
        ({"network": "conv2", "precision": "bfloat16"}, "form must be 'masked'; got 'compact'"),
        (
            {"network": "conv2", "form": "masked", "schedule": "learned", "criterion": "none"},
            "learned masks are computed in float32, contiguous and compact; got float32,",
        ),
        ({"limits": (("linear", 0.5),)}, r"limits must be one of \(\('linear', 0.45\), .*; got"),
        ({"remake": -1}, "remake must be 0 .* got -1"),
    ],
)
def test_a_run_takes_the_arithmetic_that_there_is(change, message):
    with pytest.raises(ValueError, match=message):
        SMOKE(**change)


@needs_kernels
def test_the_limits_of_a_config_are_those_of_dispatch():
    """A limit that is changed makes runs of its own: add its value to LITERALS, not to LIMITS."""
    assert arithmetic.limits_here() == LITERALS["limits"][0] == SMOKE().limits
    for network in NETWORKS.values():
        start = models.dense_start(network, 0, "cpu")
        masks = ls.prune(start.weights, start.weights, start.masks, "large_init", 0.5)
        start = Began(masks, start.weights, {})
        model = models.model_of(network, start, "cpu")
        layers = [layer for layer in model.modules() if isinstance(layer, Compact)]
        assert len(layers) == len(masks)
        assert {layer.products for layer in layers} == {"auto"}  # no measurement of `ls.plan`
        assert {str(layer.weight.dtype) for layer in layers} == {"torch.float32"}
        assert all(layer.weight_effective.is_contiguous() for layer in layers)


# a process that computes otherwise


@pytest.mark.parametrize(
    ("module", "name", "value", "message"),
    [
        (
            arithmetic,
            "numerics",
            lambda: -1,
            "is of numerics 1, but .* numerics -1.* --numerics -1",
        ),
        (arithmetic, "numerics", lambda: 0, "not built .*: build the kernels by .*--numerics 0"),
        (arithmetic, "has_node", lambda: False, "built for one torch is not there .*build the"),
        (
            limits,
            "MAX_DENSITY_STEP",
            0.5,
            "'step': 0.45.* but this version computes by .*'step': 0.5",
        ),
        (dispatch, "forced", lambda: "dense", "backend 'dense' is forced: unset LS_BACKEND"),
    ],
    ids=["portable", "not built", "no node", "limits", "forced"],
)
@needs_kernels
def test_a_study_is_refused_before_anything_is_written(
    module, name, value, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(arithmetic, "numerics", lambda: 1)
    arithmetic.check(SMOKE(), "cpu")
    monkeypatch.setattr(module, name, value)
    with pytest.raises(arithmetic.OtherArithmetic, match=message):
        arithmetic.check(SMOKE(), "cpu")
    assert main(command(tmp_path / "new")) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: fc-dense-s0-smoke-")
    assert said.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_on_a_gpu_the_numerics_of_cpu_kernels_are_not_asked(monkeypatch):
    monkeypatch.setattr(arithmetic, "numerics", lambda: 0)
    arithmetic.check(SMOKE(), "cuda:0")
    monkeypatch.setattr(dispatch, "forced", lambda: "triton")
    with pytest.raises(arithmetic.OtherArithmetic):
        arithmetic.check(SMOKE(), "cuda:0")


@needs_kernels
def test_portable_kernels_are_refused_and_have_runs_of_their_own(tmp_path):
    portable = {**os.environ, "LS_CPU": "portable"}
    call = partial(subprocess.run, env=portable, text=True, capture_output=True)
    python = [sys.executable, "-m", "experiments"]
    done = call([*python, *command(tmp_path / "new")])
    assert done.returncode == 1
    assert (
        "but the CPU kernels here have numerics -1 (LS_CPU=portable): unset LS_CPU" in done.stderr
    )
    done = call([*python, *command(tmp_path / "new", "--numerics", "-1")])
    assert done.returncode == 0, done.stderr
    (row,) = Store(tmp_path / "new").rows()
    assert row["numerics"] == -1
    assert row["run_id"].startswith("fc-dense-numerics_-1-s0-smoke-")
    assert readable([row])[0]["run_id"] == SMOKE(criterion="none").id
    made = Store(tmp_path / "new").records()[-1]
    assert made["machine"]["kernels"]["numerics"] == -1


def test_an_unknown_instruction_set_is_one_sentence(monkeypatch):
    def unknown():
        raise RuntimeError("LS_CPU is 'sse9'")

    monkeypatch.setattr(dispatch, "numerics", unknown)
    with pytest.raises(ValueError, match="LS_CPU is 'sse9'"):
        machine.numerics()


def test_libraries_that_are_held_back_are_another_arithmetic():
    code = (
        "from experiments.store import arithmetic, machine;"
        "print(arithmetic.here('cpu')); print(machine.blas()['held'])"
    )
    held = {**os.environ, "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", code], env=held, text=True, capture_output=True)
    name, settings = done.stdout.splitlines()
    assert name.endswith("MKL_ENABLE_INSTRUCTIONS=AVX2, ONEDNN_MAX_CPU_ISA=AVX2")
    assert name != arithmetic.here("cpu")
    assert settings == "{'MKL_ENABLE_INSTRUCTIONS': 'AVX2', 'ONEDNN_MAX_CPU_ISA': 'AVX2'}"
