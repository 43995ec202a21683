"""Every Triton kernel compiles for sm_80 and sm_90, as benchmarks/results/compile.json stores it.

A stored row counts as long as the source it was compiled from has not changed; `make compile-gate`
compiles what has. One kernel is compiled here each time.
"""

from __future__ import annotations

import importlib.util
import json
import os

import pytest

pytestmark = [
    pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
    ),
]


@pytest.fixture(scope="module")
def gate():
    from benchmarks.compile import gate as compile_gate

    return compile_gate


@pytest.fixture(scope="module")
def stored(gate):
    return json.loads(gate.RESULTS.read_text())


def test_every_kernel_is_stored_as_it_is_now(gate, stored):
    import triton

    versions = {row["triton"] for row in stored.values()}
    if versions != {triton.__version__}:
        pytest.skip(f"compiled by Triton {versions}, here is {triton.__version__}")
    now = {f"{name}, sm_{arch}": (launch, arch) for name, arch, launch in gate.rows("")}
    assert stored.keys() == now.keys(), "run `make compile-gate`"
    changed = [k for k, (launch, a) in now.items() if stored[k]["source"] != launch.fingerprint(a)]
    assert not changed, f"run `make compile-gate`: {changed[:3]}"


def test_no_stored_kernel_has_a_fault(gate, stored):
    for key, row in stored.items():
        name, arch = key.rsplit(", sm_", 1)
        assert not gate.faults(name, int(arch), row)


def test_a_kernel_compiles(gate):
    name, arch, launch = next(row for row in gate.rows("masked_linear") if row[1] == 90)
    row = gate.measure(launch, arch)
    assert not gate.faults(name, arch, row)
    assert row["counts"]["HGMMA"] > 0
    assert row["registers"] > 0


def test_faults_are_found(gate):
    good = {"stack": 0, "shared": 1 << 10, "grid": [1, 1, 1], "counts": {"HGMMA": 8}}
    assert not gate.faults("masked_linear product bf16", 90, good)
    for change, word in (
        ({"stack": 8}, "spills"),
        ({"shared": 1 << 20}, "shared memory"),
        ({"grid": [1, 1 << 16, 1]}, "grid"),
        ({"counts": {"HMMA": 8}}, "HGMMA"),
    ):
        (fault,) = gate.faults("masked_linear product bf16", 90, good | change)
        assert word in fault
