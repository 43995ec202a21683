"""What was measured on this machine: entries with age and versions, in files of the cache folder.

A file that cannot be read counts as empty; one that cannot be written costs time, nothing else.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

from lottery_sparse.files import write_whole

DAYS = 14  # after which an entry counts no more
HOLDING = ("MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
RATE = "rate.json", "dense over kernels"  # the file and its entry, see planning/rate.py


def path_of(name: str) -> Path:
    """A file in LS_CACHE_DIR, else in the user's cache folder.

    Where the user has no home (a bare uid in a container), nothing is kept.
    """
    folder = os.environ.get("LS_CACHE_DIR")
    if folder:
        return Path(folder) / name
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        return Path(os.devnull)
    return Path(base) / "lottery_sparse" / name


def get(name: str, key: str, **versions: Any) -> dict[str, Any] | None:
    """An entry that is young enough, of these versions and those of `stamp`; else None."""
    try:
        entry = _read(name)[key]
    except KeyError:
        return None
    wanted = stamp() | versions if is_young(entry) else {}
    return entry if wanted and all(entry.get(k) == v for k, v in wanted.items()) else None


def put(name: str, key: str, **entry: Any) -> None:
    """Add an entry, and take out those that are too old."""
    entries = {k: old for k, old in _read(name).items() if is_young(old)}
    entries[key] = stamp() | {"time": time.time(), "cpu": processor()} | entry
    path = path_of(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(entries, indent=1, sort_keys=True).encode())
    except (OSError, RecursionError):
        pass


def _read(name: str) -> dict[str, Any]:
    try:
        entries = json.loads(path_of(name).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return entries if isinstance(entries, dict) else {}


def is_young(entry: Any) -> bool:
    try:
        return 0 <= time.time() - number(entry["time"]) <= DAYS * 24 * 3600
    except (KeyError, TypeError, ValueError):
        return False


def number(value: Any) -> float:
    """A number of a file, which is at least 0 and finite; TypeError, ValueError for others."""
    if type(value) not in (int, float):  # no text, no true
        raise TypeError(f"{type(value).__name__} is no number")
    if not 0 <= value < sys.float_info.max:  # 10**400 has no float
        raise ValueError("it is no finite number")
    return float(value)


def stamp() -> dict[str, Any]:
    """Versions; a measurement under other versions does not count."""
    return {"torch": torch.__version__, "kernels": _kernels()}


@functools.cache
def _kernels() -> str:
    """Variant of the CPU kernels, and when they were built."""
    try:
        variant = importlib.import_module("lottery_sparse._host").cpu_variant()
        found = importlib.util.find_spec("lottery_sparse._C")
        built = os.stat(found.origin).st_mtime_ns if found and found.origin else 0
    except (ImportError, RuntimeError, OSError):
        return ""
    return f"{variant} {built}"


@functools.cache
def processor() -> str:
    """The model of the CPU."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # by lines: there are many cores
            names = (line for line in lines if line[:10] == "model name")
            return next(names, ":").split(":", 1)[1].strip()
    except OSError:
        return platform.processor()


def held() -> list[str]:
    """The instruction sets that environment variables hold the dense libraries to."""
    return [os.environ.get(name, "") for name in HOLDING]


def dense_rate() -> float | None:
    """How many times as fast the dense library multiplies as the kernels, if it was measured here.

    None, too, where LS_MACHINE=0 says to go by what the code says.
    """
    if os.environ.get("LS_MACHINE") == "0":
        return None
    file, key = RATE
    entry = get(file, key, cpu=processor(), held=held())
    try:
        found = number(entry["ratio"]) if entry else None
    except (KeyError, TypeError, ValueError):
        return None
    return found or None
