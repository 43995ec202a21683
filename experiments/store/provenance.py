"""Where numbers come from: commit, versions, machine, data."""

import hashlib
import os
import socket
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

from experiments.store.machine import machine, versions
from experiments.study import parts
from experiments.train.data import Dataset

HERE = Path(__file__).resolve().parents[1]  # experiments


@cache
def provenance() -> dict[str, Any]:
    """Of this process: it does not change while it runs. What is not known is None."""
    commit, dirty = _revision()
    return {
        "commit": commit,
        "dirty": dirty,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "versions": versions(),
        "machine": machine(),
    }


@cache
def digest(dataset: Dataset) -> str:
    """SHA-256 of all images, as bytes (of others' sets as floats), and labels: train, val, test."""
    found = hashlib.sha256()
    for part in (dataset.train, dataset.val, dataset.test):
        pixels = part.images if parts.is_path(dataset.name) else (part.images * 255).round().byte()
        found.update(pixels.cpu().numpy().tobytes())
        found.update(part.labels.cpu().numpy().tobytes())
    return found.hexdigest()


def _revision() -> tuple[str | None, bool | None]:
    """The commit of these files, and whether they differ from it; None where git does not say.

    Git fails where it is not installed, and in a checkout of another user. These files may also lie
    in somebody else's repository, whose commit is not theirs.
    """
    found = _git("rev-parse", "--show-toplevel", "HEAD")
    top, _, commit = (found or "").partition("\n")
    if not commit or Path(top).resolve() != HERE.parent:
        return None, None
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return commit, None if changes is None else bool(changes)


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", HERE, *arguments], capture_output=True, text=True, check=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
