"""Tickets as files: safetensors with a JSON header. Nothing is pickled, nothing is executed.

masks.NAME    uint8, eight entries a byte (Masks.to_bits)
start.NAME    the state that training starts from, where it is a tensor
frozen.NAME   what pruned weights hold, where it is not zero
header        "ticket": JSON of the format, the masks' shapes, sources and the rest
              "digests": JSON, sha256 of the header, of each tensor, and of what sources draw
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lottery_sparse.files import write_whole
from lottery_sparse.frozen import Seeded, SignOf, drawn
from lottery_sparse.masks import Masks

FORMAT = 1
HEADER = "header"  # its entry among the digests


class Saved(NamedTuple):
    """The file a ticket was loaded from, and the digests that stand in it."""

    path: str
    digests: dict[str, str]


Parts = tuple[Masks, dict[str, Any], dict[str, Tensor], dict[str, Any], Saved | None]


def save(
    path: str | os.PathLike[str],
    masks: Masks,
    start: Mapping[str, Any],
    frozen: Mapping[str, Tensor],
    others: Mapping[str, Any],
) -> None:
    tensors = {f"masks.{name}": packed for name, packed in masks.to_bits().items()}
    tensors |= {f"start.{name}": v for name, v in start.items() if isinstance(v, Tensor)}
    tensors |= {f"frozen.{name}": value for name, value in frozen.items()}
    header = {
        "ticket": _header(masks, start, others),
        "digests": json.dumps(digests(masks, start, frozen, others)),
    }
    # copies, since safetensors refuses tensors that share memory or are not contiguous
    tensors = {
        name: t.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, t in tensors.items()
    }
    write_whole(Path(path), safetensors.torch.save(tensors, header))


def load(path: str | os.PathLike[str]) -> Parts:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            header = json.loads(metadata["ticket"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        found = header.pop("format", None)
    except (safetensors.SafetensorError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no ticket of this package: {_said(error)}.") from None
    if found != FORMAT:
        raise ValueError(
            f"{path} is a ticket of format {found}, this version reads format {FORMAT}; "
            "use a newer version."
        )
    parts: dict[str, dict[str, Any]] = {"masks": {}, "start": {}, "frozen": {}}
    for key, value in tensors.items():
        part, _, name = key.partition(".")
        parts.setdefault(part, {})[name] = value
    try:
        masks = Masks.from_bits(parts["masks"], header.pop("shapes"))
        sources = {name: _from_json(value) for name, value in header.pop("sources").items()}
        others = {name: header[name] for name in ("history", "released", "rescale")}
        start = {**parts["start"], **sources}
        stored = json.loads(metadata["digests"]) if "digests" in metadata else None
        saved = None if stored is None else Saved(os.fspath(path), dict(stored))
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} holds no whole ticket ({_said(error)}): it was changed since it was saved; "
            "fetch or make it again."
        ) from None
    if saved is not None:
        now = digests(masks, start, parts["frozen"], others, draw=False)
        if changed := differing(saved, now, masks, start):
            raise ValueError(
                f"{path} was changed since it was saved: {changed} is not what its digest says; "
                "fetch or make it again."
            )
    return masks, start, parts["frozen"], others, saved


def digests(
    masks: Masks,
    start: Mapping[str, Any],
    frozen: Mapping[str, Tensor],
    others: Mapping[str, Any],
    draw: bool = True,
) -> dict[str, str]:
    """sha256 of all that makes a ticket, by name; without `draw`, of sources only as they read."""
    tensors = {f"masks.{name}": packed for name, packed in masks.to_bits().items()}
    for name, value in start.items():
        if isinstance(value, Tensor):
            tensors[f"start.{name}"] = value
        elif draw and name in masks and isinstance(value, Seeded | SignOf):
            tensors[f"start.{name}"] = drawn(name, value, masks[name].shape)
    tensors |= {f"frozen.{name}": value for name, value in frozen.items()}
    # through JSON once, after which keys are strings and sort as they do in a file
    header = json.dumps(json.loads(_header(masks, start, others)), sort_keys=True)
    return {
        HEADER: hashlib.sha256(header.encode()).hexdigest(),
        **{name: _digest(tensor) for name, tensor in tensors.items()},
    }


def differing(
    saved: Saved, now: Mapping[str, str], masks: Masks, start: Mapping[str, Any]
) -> str | None:
    """What is not as it was saved, in words; None: all of `now` is, and nothing is missing.

    Sources whose values were not drawn, which `now` has no digest of, are left out.
    """
    undrawn = {
        f"start.{name}" for name, value in start.items() if not isinstance(value, Tensor)
    } - now.keys()
    names = sorted(
        name
        for name in (now.keys() | saved.digests.keys()) - undrawn
        if now.get(name) != saved.digests.get(name)
    )
    if not names:
        return None
    part, _, name = min(names, key=lambda key: key == HEADER).partition(".")
    if part == HEADER:
        return "its header"
    if part == "masks":
        return f"the mask of {name}"
    if part == "frozen":
        return f"what pruned weights of {name} hold"
    source = start.get(name)
    drawn_by = "" if isinstance(source, Tensor) else f" drawn by {source}"
    return f"the start of {name}{drawn_by}"


def _digest(tensor: Tensor) -> str:
    """Of dtype, shape and bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    content = flat.view(torch.uint8).numpy().tobytes()
    kind = f"{tensor.dtype} {list(tensor.shape)} "
    return hashlib.sha256(kind.encode() + content).hexdigest()


def _header(masks: Masks, start: Mapping[str, Any], others: Mapping[str, Any]) -> str:
    sources = {
        name: _as_json(name, value)
        for name, value in start.items()
        if not isinstance(value, Tensor)
    }
    header = {
        "format": FORMAT,
        "shapes": {name: list(mask.shape) for name, mask in masks.items()},
        "sources": sources,
        **others,
    }
    try:
        return json.dumps(header, sort_keys=True)
    except TypeError as error:
        raise TypeError(
            f"history holds what JSON cannot ({error}); keep numbers, strings, lists and dicts."
        ) from None


def _said(error: Exception) -> str:
    """Its message without a full stop; that of a KeyError is only a name."""
    return f"it has no {error.args[0]}" if isinstance(error, KeyError) else str(error).rstrip(".")


def _as_json(name: str, value: Any) -> Any:
    if isinstance(value, str) and value == "zero":
        return value
    if isinstance(value, SignOf):
        return {"constant": value.constant, "sign_of": asdict(value.source)}
    if isinstance(value, Seeded):
        return asdict(value)
    raise TypeError(
        f'the start of {name} must be a tensor, ls.Seeded, ls.SignOf or "zero", '
        f"got {type(value).__name__}."
    )


def _from_json(value: Any) -> Any:
    if isinstance(value, str):
        if value != "zero":
            raise ValueError(f'a start in words is "zero", got {value!r}')
        return value
    if "sign_of" in value:
        return SignOf(Seeded(**value["sign_of"]), value["constant"])
    return Seeded(**value)
