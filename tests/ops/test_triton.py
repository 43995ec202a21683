"""The Triton kernels pass their tests in the interpreter, where there is no GPU to run them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton is not installed"
    ),
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="tests/ops/triton runs on the GPU by itself"
    ),
]


@pytest.mark.slow
def test_the_kernels_pass_in_the_interpreter():
    folder = Path(__file__).with_name("triton")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", folder],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout


def test_without_the_interpreter_cpu_tensors_are_refused():
    import lottery_sparse as ls

    x, weight = torch.ones(2, 3), torch.ones(4, 3)
    with (
        ls.use_backend("triton"),
        pytest.raises(RuntimeError, match="masked_linear has no triton backend for cpu tensors"),
    ):
        ls.ops.masked_linear(x, weight, weight.bool())
