"""Experiments and the package on a CUDA device that is none: see fake_cuda.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments.train.loop import EVALUATION_BATCH, at_once

HERE = Path(__file__).resolve().parent

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or not (shutil.which("c++") or shutil.which("g++")),
    reason="needs a machine without CUDA, and a compiler",
)


def test_a_device_refuses_what_cuda_refuses_and_runs_what_a_gpu_would():
    """In a process of its own, which has that device for good."""
    environment = {
        k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "LS_BACKEND")
    }
    done = subprocess.run(
        [sys.executable, str(HERE / "fake_cuda.py"), str(HERE / "fake_cuda_walk.py")],
        cwd=HERE.parents[1], env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("walked\n"), done.stdout


def test_many_networks_take_fewer_images_at_once_on_a_gpu():
    cuda = torch.device("cuda:0")
    assert [at_once(n, cuda) for n in (1, 8, 55, 10_000)] == [1000, 1000, 145, 1]
    assert at_once(55, torch.device("cpu")) == EVALUATION_BATCH
