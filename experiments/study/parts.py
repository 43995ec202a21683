"""Networks, data sets and criteria of somebody else: what "module:attr" names.

The current folder counts, as for `python -m`. What a name means is looked up where it is computed
with, never where rows are read: a store cannot make its reader import anything.
"""

import hashlib
import importlib
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lottery_sparse as ls


def is_path(name: object) -> bool:
    """Whether a name is "module:attr", and not one of ours."""
    return isinstance(name, str) and ":" in name


@cache
def attribute(path: str, what: str) -> Any:
    """The object that "module:attr" names.

    Raises:
        ValueError: the module or the attribute is not there, or the module fails as it is imported.
    """
    module, _, names = path.partition(":")
    if not module or not names:
        raise ValueError(f"{what} must be a name or MODULE:ATTR, got {path!r}.")
    try:
        found = importlib.import_module(module)
    except Exception as error:  # whatever a module does
        missing = isinstance(error, ModuleNotFoundError) and module.startswith(str(error.name))
        why = "there is no such module" if missing else f"its import fails ({said(error)})"
        raise ValueError(
            f"{what} {path} is not to be had: {why}; start where `import {module}` works."
        ) from error
    for name in names.split("."):
        if not hasattr(found, name):
            raise ValueError(f"{what} {path} is not to be had: {module} has no {names}.")
        found = getattr(found, name)
    return found


@cache
def digest(path: str) -> str:
    """Of the file that "module:attr" is in: another text makes another run."""
    attribute(path, "what a run needs,")
    file = getattr(sys.modules[path.partition(":")[0]], "__file__", None)
    return hashlib.sha256(Path(file).read_bytes() if file else b"").hexdigest()[:12]


@cache
def criterion(name: str) -> str | Callable[..., Any]:
    """What `ls.prune` takes for a criterion: one of its names, or the function that a path names.

    Raises:
        ValueError: the path names no function (w_init, w_final, generator) -> scores.
    """
    if not is_path(name):
        return name
    found = attribute(name, "criterion")
    if not callable(found):
        wanted = "a function (w_init, w_final, generator) -> scores"
        raise ValueError(f"criterion {name} must be {wanted}, got {kind(found)}.")
    weights = torch.linspace(-1, 1, 6), torch.linspace(1, -2, 6)
    try:
        scores = found(*weights, ls.random.Stream(0, "try"))
    except Exception as error:
        raise ValueError(
            f"criterion {name} fails on two vectors of 6 weights and a generator ({said(error)})."
        ) from error
    if not isinstance(scores, Tensor) or scores.shape != (6,):
        raise ValueError(f"criterion {name} must give a score per weight, [6], got {kind(scores)}.")
    return found


def kind(value: object) -> str:
    """A value in a sentence: "[2, 10] of float32", "a list"."""
    if isinstance(value, Tensor):
        return f"{list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    return f"a {type(value).__name__}"


def said(error: Exception) -> str:
    """An error of somebody else's code in one line."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
