"""How the CPU kernels were built, and that every variant of them passes test_native.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lottery_sparse.ops import dispatch

_host = pytest.importorskip(
    "lottery_sparse._host", reason="_host is not built", exc_type=ImportError
)
pytest.importorskip("lottery_sparse._C", reason="_C is not built", exc_type=ImportError)

ops = torch.ops.lottery_sparse_native
VARIANT = _host.cpu_variant()


def test_errors_do_not_say_where_the_kernels_were_built():
    x, weight = torch.zeros(2, 4, dtype=torch.float64), torch.zeros(3, 4)
    with pytest.raises(RuntimeError, match="x must be Float") as caught:
        ops.masked_linear(x, weight, weight > 0, None)
    assert re.search(r"csrc/\w+/\w+\.(h|cpp):\d", str(caught.value))
    assert "/csrc/" not in str(caught.value)


def test_host_knows_the_build():
    info = _host.build_info()
    assert info["stable_abi_target"] == "0x020b000000000000"
    assert VARIANT in info["variants_usable"]
    assert set(info["variants_usable"]) <= set(info["variants_compiled"])
    assert "-march=native" not in info["flags"]
    assert "-ffast-math" not in info["flags"]
    for schema in info["ops"]:
        assert hasattr(ops, schema.split("(")[0])


def run_again(variant: str, *command: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command],
        env=os.environ | {"LS_CPU": variant},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.mark.slow
@pytest.mark.skipif("LS_CPU" in os.environ, reason="this is the run of one variant")
@pytest.mark.parametrize("variant", sorted(set(_host.build_info()["variants_usable"]) - {VARIANT}))
def test_every_variant_passes_test_native(variant):
    kernels = str(Path(__file__).with_name("test_native.py"))
    done = run_again(variant, "-m", "pytest", "-q", "--durations=0", kernels)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("variant", _host.build_info()["variants_usable"])
def test_numerics_names_the_bits_of_a_variant(variant):
    done = run_again(
        variant, "-c", "from lottery_sparse.ops import dispatch; print(dispatch.numerics())"
    )
    expected = {"portable": -1, "avx2": 1, "avx512": 1}[variant]
    assert (done.returncode, done.stdout.strip()) == (0, str(expected))


def test_without_kernels_there_is_no_numerics(monkeypatch):
    monkeypatch.setattr(dispatch, "built", lambda name: name != "cpu")
    assert dispatch.numerics() == 0


def test_an_unknown_variant_is_refused():
    done = run_again("sse9", "-c", "from lottery_sparse import _host; _host.cpu_variant()")
    assert done.returncode != 0
    assert "LS_CPU is 'sse9'" in done.stdout
    assert VARIANT in done.stdout
