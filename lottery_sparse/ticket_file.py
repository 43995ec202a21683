"""Tickets as files: safetensors with a JSON header. Nothing is pickled, nothing is executed.

masks.NAME    uint8, eight entries a byte (Masks.to_bits)
start.NAME    the state that training starts from, where it is a tensor
frozen.NAME   what pruned weights hold, where it is not zero
header        "ticket": JSON of the format, the masks' shapes, sources and the rest
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lottery_sparse.frozen import Seeded, SignOf
from lottery_sparse.masks import Masks

FORMAT = 1

Parts = tuple[Masks, dict[str, Any], dict[str, Tensor], dict[str, Any]]


def save(
    path: str | os.PathLike[str],
    masks: Masks,
    start: Mapping[str, Any],
    frozen: Mapping[str, Tensor],
    others: Mapping[str, Any],
) -> None:
    tensors = {f"masks.{name}": packed for name, packed in masks.to_bits().items()}
    sources: dict[str, Any] = {}
    for name, value in start.items():
        if isinstance(value, Tensor):
            tensors[f"start.{name}"] = value
        else:
            sources[name] = _as_json(name, value)
    tensors |= {f"frozen.{name}": value for name, value in frozen.items()}
    header = {
        "format": FORMAT,
        "shapes": {name: list(mask.shape) for name, mask in masks.items()},
        "sources": sources,
        **others,
    }
    try:
        text = json.dumps(header, sort_keys=True)
    except TypeError as error:
        raise TypeError(
            f"history holds what JSON cannot ({error}); keep numbers, strings, lists and dicts."
        ) from None
    # copies, since safetensors refuses tensors that share memory or are not contiguous
    tensors = {
        name: t.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, t in tensors.items()
    }
    _write_whole(Path(path), safetensors.torch.save(tensors, {"ticket": text}))


def load(path: str | os.PathLike[str]) -> Parts:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["ticket"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is no ticket of this package: {error}.") from None
    found = header.pop("format", None)
    if found != FORMAT:
        raise ValueError(
            f"{path} is a ticket of format {found}, this version reads format {FORMAT}; "
            "use a newer version."
        )
    parts: dict[str, dict[str, Any]] = {"masks": {}, "start": {}, "frozen": {}}
    for key, value in tensors.items():
        part, _, name = key.partition(".")
        parts.setdefault(part, {})[name] = value
    masks = Masks.from_bits(parts["masks"], header.pop("shapes"))
    sources = {name: _from_json(value) for name, value in header.pop("sources").items()}
    return masks, {**parts["start"], **sources}, parts["frozen"], header


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
        return value
    if "sign_of" in value:
        return SignOf(Seeded(**value["sign_of"]), value["constant"])
    return Seeded(**value)


def _write_whole(path: Path, content: bytes) -> None:
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)  # NamedTemporaryFile makes it private
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
