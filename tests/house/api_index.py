"""docs/api.md: every public name with its signature and the first sentence of its docstring.

    python tests/house/api_index.py     # writes the page anew

Names are those of public_api.txt, so the page cannot lack one. What a name is for is said once, in
its docstring.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import test_public_api as api  # noqa: E402

import lottery_sparse as ls  # noqa: E402

PAGE = ROOT / "docs" / "api.md"
HEAD = """# API index

Every public name, with the first sentence of its docstring. `help(ls.NAME)` has the whole of it:
equation, shapes, dtypes, errors, and an example that a test runs. What to use when is in the
[guide](guide.md). `python tests/house/api_index.py` writes this page.
"""
# Heading -> what it is for, and the names that it holds, in this order; a namespace with all in it.
GROUPS: dict[str, tuple[str, tuple[str, ...]]] = {
    "Five forms": (
        "Each gives its form, in place, from whatever form the model has. See [which form "
        "when](guide.md#which-form-when).",
        ("sparsify_", "compact_", "supermask_", "pack_", "densify_"),
    ),
    "Masks": ("", ("masks_of", "set_masks_", "Masks")),
    "Pruning": ("", ("prune", "pruning")),
    "Tickets": ("", ("find_ticket", "Ticket")),
    "What pruned weights hold": ("", ("frozen",)),
    "Learned masks": ("", ("learning",)),
    "Training and planning": ("", ("plan", "train_step", "optim")),
    "Layers": (
        "Constructors are those of torch's layers; verbs make them of a model's.",
        ("nn",),
    ),
    "Checkpoints": ("", ("dense_state_dict",)),
    "Several networks side by side": ("", ("ensemble",)),
    "Channels": ("", ("channels",)),
    "Backends": ("", ("use_backend",)),
    "Ops": ("The functions below the layers, with gradients.", ("ops",)),
    "Random numbers": ("The same bits on every machine, device and thread count.", ("random",)),
}


def members(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """(name, object) of a public name, and of all that a namespace, table or class has in it."""
    if isinstance(value, ModuleType):
        own = [n for n, v in vars(value).items() if api.is_ours(v) and is_of(v, value)]
        for inner in sorted(getattr(value, "__all__", [n for n in own if not n.startswith("_")])):
            yield from members(f"{name}.{inner}", getattr(value, inner))
        return
    yield name, value
    if isinstance(value, dict):
        for key, function in value.items():
            yield f'{name}["{key}"]', function
    elif isinstance(value, type) and not issubclass(value, api.Module | api.Optimizer):
        for attribute in sorted(a for a in dir(value) if not a.startswith("_")):
            static = inspect.getattr_static(value, attribute)
            inner = static.__func__ if isinstance(static, classmethod | staticmethod) else static
            inner = inner.fget if isinstance(inner, property) else inner
            if inspect.isfunction(inner) and api.is_ours(inner) and inner.__name__ != "_refuse":
                yield f"{name}.{attribute}", static


def is_of(value: Any, module: ModuleType) -> bool:
    return value.__module__ == module.__name__


def public() -> dict[str, Any]:
    return {n: v for top in ls.__all__ for n, v in members(top, getattr(ls, top))}


def sentence(value: Any) -> str:
    """The first sentence of a docstring, on one line, fit for a cell of a table."""
    value = value.__func__ if isinstance(value, classmethod | staticmethod) else value
    paragraph = re.sub(r"\s+", " ", (inspect.getdoc(value) or "").split("\n\n")[0]).strip()
    first = re.split(r"(?<=[^.]\w\w[.)])\s(?=[A-Z`])", paragraph)[0]
    return first.replace("|", "\\|")


def shown(name: str, value: Any) -> str:
    """The name, and its arguments without defaults that are long to read."""
    value = value.__func__ if isinstance(value, classmethod | staticmethod) else value
    if isinstance(value, property | dict) or '["' in name:
        return f"`{name}`" if '["' in name else f"`ls.{name}`"
    if isinstance(value, type) and issubclass(value, api.Optimizer | api.Module):
        return f"`ls.{name}`"
    names = [
        f"{'*' * (p.kind == p.VAR_POSITIONAL) + '**' * (p.kind == p.VAR_KEYWORD)}{n}"
        for n, p in inspect.signature(value).parameters.items()
        if n not in ("self", "cls")
    ]
    return f"`ls.{name}({', '.join(names)})`"


def rows(name: str) -> Iterator[str]:
    for inner, value in members(name, getattr(ls, name)):
        if isinstance(value, dict):
            yield f"| `ls.{inner}` | {len(value)} functions by name: |"
        else:
            label = f'`"{inner.split(chr(34))[1]}"`' if '["' in inner else shown(inner, value)
            yield f"| {label} | {sentence(value)} |"


def page() -> str:
    text = HEAD
    for heading, (intro, names) in GROUPS.items():
        text += f"\n## {heading}\n\n" + (f"{intro}\n\n" if intro else "")
        text += "| name | what it is |\n|---|---|\n"
        text += "".join(f"{row}\n" for name in names for row in rows(name))
    return text


def missing() -> list[str]:
    """Public names in no group, and names that are no longer public."""
    grouped = {name for _, names in GROUPS.values() for name in names}
    return sorted(grouped ^ set(ls.__all__))


if __name__ == "__main__":
    if odd := missing():
        sys.exit(f"GROUPS of {Path(__file__).name} and ls.__all__ differ in: {', '.join(odd)}")
    PAGE.write_text(page(), "utf-8")
