"""The public names and their signatures are those of public_api.txt: a change is a decision.

`python tests/house/test_public_api.py` writes the file anew, after a change that is meant.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from torch.nn import Module
from torch.optim import Optimizer

import lottery_sparse as ls

SNAPSHOT = Path(__file__).resolve().with_name("public_api.txt")


def parameters_of(function: object) -> str:
    """Names, kinds and defaults; annotations are for readers, and say the same in many ways."""
    signature = inspect.signature(function)  # type: ignore[arg-type]
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(bare))


def is_ours(value: object) -> bool:
    return (getattr(value, "__module__", "") or "").split(".")[0] == "lottery_sparse"


def lines_of_class(name: str, cls: type) -> Iterator[str]:
    """The constructor, torch's own left out; methods too, but of a module, whose forward it is."""
    yield f"{name}{'' if issubclass(cls, Optimizer) else parameters_of(cls)}"
    if issubclass(cls, Module | Optimizer):
        return
    for attribute in sorted(a for a in dir(cls) if not a.startswith("_")):
        value = inspect.getattr_static(cls, attribute)
        function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        if inspect.isfunction(function) and is_ours(function):
            yield f"{name}.{attribute}{parameters_of(function)}"
        elif isinstance(value, property) and is_ours(value.fget):
            yield f"{name}.{attribute}"


def lines_of(name: str, value: object) -> Iterator[str]:
    if isinstance(value, ModuleType):
        own = [n for n, v in vars(value).items() if is_ours(v) and v.__module__ == value.__name__]
        for inner in sorted(getattr(value, "__all__", [n for n in own if not n.startswith("_")])):
            yield from lines_of(f"{name}.{inner}", getattr(value, inner))
    elif isinstance(value, dict):
        yield f"{name} {{{', '.join(value)}}}"
    elif isinstance(value, type):
        yield from lines_of_class(name, value)
    else:
        yield f"{name}{parameters_of(value)}"


def public_api() -> str:
    lines = (line for name in sorted(ls.__all__) for line in lines_of(name, getattr(ls, name)))
    return "".join(f"{line}\n" for line in lines)


def test_names_and_signatures_are_those_of_the_snapshot():
    assert public_api().splitlines() == SNAPSHOT.read_text("utf-8").splitlines(), (
        "the public API changed; if that is meant: python tests/house/test_public_api.py, CHANGELOG"
    )


if __name__ == "__main__":
    SNAPSHOT.write_text(public_api(), "utf-8")
