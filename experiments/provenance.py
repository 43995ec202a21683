"""Where numbers come from: commit, versions, machine, data."""

import hashlib
import os
import platform
import socket
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lottery_sparse as ls
from experiments.data import Dataset

HERE = Path(__file__).resolve().parent


@cache
def provenance() -> dict[str, Any]:
    """Of this process: it does not change while it runs."""
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "versions": {
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
            "lottery_sparse": ls.__version__,
        },
    }


@cache
def digest(dataset: Dataset) -> str:
    """SHA-256 of all images, as bytes, and labels, in the order of train, val, test."""
    found = hashlib.sha256()
    for part in (dataset.train, dataset.val, dataset.test):
        found.update((part.images * 255).round().byte().cpu().numpy().tobytes())
        found.update(part.labels.cpu().numpy().tobytes())
    return found.hexdigest()


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", HERE, *arguments], capture_output=True, text=True, check=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return ""  # not a checkout, or no git
    return done.stdout.strip()
