"""No CPU kernel touches a byte beyond the tensors and buffers it was given.

The malloc of guard_pages.cpp puts each of them against an unreadable page, at its end and then at
its start, in a process that dies where a kernel goes further. Tensors then begin at any multiple of
their element, which is what tensors over foreign memory (torch.frombuffer) may do as well.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lottery_sparse.ops import dispatch

if not dispatch.built("cpu"):
    pytest.skip("the native kernels (lottery_sparse._C) are not built", allow_module_level=True)
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
if not sys.platform.startswith("linux") or COMPILER is None:
    pytest.skip("needs Linux and a C++ compiler", allow_module_level=True)
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    library = tmp_path_factory.mktemp("guard") / "guard_pages.so"
    source = HERE / "guard_pages.cpp"
    built = subprocess.run(
        [*COMPILER.split(), "-O1", "-shared", "-fPIC", "-o", library, source],
        capture_output=True,
        text=True,
    )
    if built.returncode and "__libc_memalign" in built.stderr:
        pytest.skip("needs glibc")
    assert built.returncode == 0, built.stderr

    def run(*variants):
        kept = {k: v for k, v in os.environ.items() if k not in ("LS_CPU", "LS_BACKEND")}
        path = os.pathsep.join(
            [str(HERE.parents[1]), str(HERE.parent / "problems"), os.environ.get("PYTHONPATH", "")]
        )
        return subprocess.run(
            [sys.executable, HERE / "guard_pages.py", *variants],
            env=kept | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
            capture_output=True,
            text=True,
        )

    return run


def test_no_kernel_reads_or_writes_beyond_its_tensors(run):
    done = run("end", "start", "portable", "avx2", "avx512")
    lines = done.stdout.splitlines()
    for side in ("end", "start"):  # the guard bites
        assert f"{side} ends with {-signal.SIGSEGV}" in lines, done.stdout + done.stderr
    for variant in ("portable", "avx2", "avx512"):
        own = [line for line in lines if line.startswith(f"{variant}")]
        last = own[-2] if len(own) > 1 else ""
        if own[-1:] == [f"{variant} ends with 77"]:
            continue  # this machine does not run it
        assert own[-1:] == [f"{variant} ends with 0"], f"died of {last}\n{done.stderr[-3000:]}"
        assert last.endswith("calls"), last
        assert int(last.split()[1]) > 500
