"""Tickets as files: safetensors with a JSON header. Nothing is pickled, nothing is executed.

masks.NAME    uint8, eight entries a byte (Masks.to_bits)
start.NAME    the state that training starts from, where it is a tensor
frozen.NAME   what pruned weights hold, where it is not zero
header        "ticket": JSON of the format, the masks' shapes, sources and the rest
              "digests": JSON, sha256 of the header, of each tensor, and of what sources draw

A file holds this and nothing else, so that no changed name passes for something optional. Format 1
is the same, but early files of it have no digests. Whoever adds to a file raises FORMAT.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from lottery_sparse.files import read_tensors, write_whole
from lottery_sparse.nn.frozen import Seeded, SignOf, drawn, keyed
from lottery_sparse.pruning.masks import Masks
from lottery_sparse.pruning.names import keys_of
from lottery_sparse.text import shown

_T = TypeVar("_T")

FORMAT = 2
HEADER = "header"  # its entry among the digests

# what JSON of a header is read as: the kind, in words
KINDS = {dict: "an object", list: "a list", str: "a string", bool: "true or false"} | {
    int: "a whole number",
    float: "a number",
    type(None): "null",
}
OTHERS: dict[str, type] = {"history": list, "released": bool, "rescale": bool}
FIELDS: dict[str, type] = {"format": int, "shapes": dict, "sources": dict, **OTHERS}


class Saved(NamedTuple):
    """The file a ticket was loaded from, and the digests that `save` would write of it."""

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
    ticket = _header(masks, start, others)
    try:
        check_frozen(frozen)
        _check_header(json.loads(ticket))
    except (ValueError, TypeError) as error:
        raise TypeError(f"the ticket cannot be saved: {_said(error)}.") from None
    header = {
        "ticket": ticket,
        "digests": json.dumps(digests(masks, start, frozen, others)),
    }
    # copies, since safetensors refuses tensors that share memory or are not contiguous
    tensors = {
        name: t.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, t in tensors.items()
    }
    write_whole(Path(path), safetensors.torch.save(tensors, header))


def load(path: str | os.PathLike[str]) -> Parts:
    where = shown(os.fspath(path), most=4096)
    try:
        tensors, metadata = read_tensors(path)
        if "ticket" not in metadata:
            raise ValueError("it has no ticket")
        header = _object(metadata, "ticket")
        format = _expect(int, header.get("format"), "its format")
        if format < 1:
            raise ValueError(f"its format must be 1 to {FORMAT}, got {format}")
    except ValueError as error:
        raise ValueError(f"{where} is no ticket of this package: {_said(error)}.") from None
    if format > FORMAT:
        raise ValueError(
            f"{where} is a ticket of format {shown(format)}, this version reads formats up to "
            f"{FORMAT}; use a newer version."
        )
    try:
        parts = _parts(metadata, header, tensors)
        masks = Masks.from_bits(parts["masks"], header["shapes"])
        start = {**parts["start"], **parts["sources"]}
        check_frozen(parts["frozen"])
        others = {name: header[name] for name in OTHERS}
        stored = _object(metadata, "digests") if "digests" in metadata else None
        if stored is None and format > 1:
            raise ValueError("it has no digests")
        now = digests(masks, start, parts["frozen"], others, draw=False)
        as_read = {**now, HEADER: _of_text(json.dumps(header, sort_keys=True))}
    except RecursionError:
        raise ValueError(f"{where} holds no whole ticket: it is nested too deep.") from None
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{where} holds no whole ticket ({_said(error)}): it was changed since it was saved; "
            "fetch or make it again."
        ) from None
    if stored is None:
        return masks, start, parts["frozen"], others, None
    saved = Saved(os.fspath(path), stored)
    if changed := differing(saved, as_read, masks, start):
        raise ValueError(
            f"{where} was changed since it was saved: {changed} is not what its digest says; "
            "fetch or make it again."
        )
    # an earlier version may have written the same header in other words, 1 for 1.0
    saved.digests[HEADER] = now[HEADER]
    return masks, start, parts["frozen"], others, saved


def check_frozen(frozen: Mapping[str, Any]) -> None:
    """Raises TypeError or ValueError for frozen values that are not floating tensors."""
    for name, value in frozen.items():
        what = f"frozen values of {shown(name)} must be a floating tensor, got "
        if not isinstance(value, Tensor):
            raise TypeError(what + type(value).__name__)
        if not value.is_floating_point():
            raise ValueError(what + str(value.dtype))


def _parts(
    metadata: Mapping[str, str], header: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, dict[str, Any]]:
    """masks, start, frozen (tensors by name) and sources of a file that holds nothing else."""
    _known(metadata, ("ticket", "digests"))
    _check_header(header)
    sources = {name: _from_json(name, value) for name, value in header["sources"].items()}
    parts: dict[str, dict[str, Any]] = {"masks": {}, "start": {}, "frozen": {}}
    for key, value in tensors.items():
        part, _, name = key.partition(".")
        _known([part], parts)
        parts[part][name] = value
    if twice := sorted(parts["start"].keys() & sources.keys()):
        raise ValueError(f"it has two starts of {twice[0]}")
    if without := sorted(header["shapes"].keys() - parts["masks"].keys()):
        raise ValueError(f"it has no mask of {without[0]}")
    return {**parts, "sources": sources}


def _check_header(header: Mapping[str, Any]) -> None:
    """Raises ValueError if a header has an entry of the wrong kind, or an unknown one."""
    _known(header, FIELDS)
    for name, kind in FIELDS.items():
        if name not in header:
            raise ValueError(f"it has no {name}")
        _expect(kind, header[name], name)
    for name, shape in header["shapes"].items():
        sizes = [
            _expect(int, size, f"a size of {name}")
            for size in _expect(list, shape, f"shape of {name}")
        ]
        if min(sizes, default=0) < 0:
            raise ValueError(f"a size of {name} must be at least 0, got {min(sizes)}")
    for number, record in enumerate(header["history"]):
        _expect(dict, record, f"record {number} of history")


def _known(names: Iterable[str], known: Iterable[str]) -> None:
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(f"it has {unknown[0]!r}, which no ticket of its format has")


def _object(metadata: Mapping[str, str], name: str) -> dict[str, Any]:
    """An entry of the header, JSON of an object."""
    try:
        value = json.loads(metadata[name])
    except RecursionError:
        raise ValueError(f"{name} is nested too deep") from None
    except ValueError as error:
        raise ValueError(f"{name} is no JSON: {error}") from None
    return _expect(dict, value, name)


def _expect(kind: type[_T], value: Any, what: str) -> _T:
    if type(value) is not kind:  # JSON has these types only, and its true is no number
        raise ValueError(f"{what} must be {KINDS[kind]}, got {KINDS[type(value)]}")
    return value


def plain(value: Any, what: str) -> Any:
    """A copy that JSON can hold: tensors and NumPy's numbers and arrays as numbers and lists.

    Raises:
        TypeError: something else is in it; the message names it, beginning with `what`.
    """
    if isinstance(value, Tensor | np.ndarray | np.generic):
        value = value.tolist()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str | int):
                raise TypeError(f"{what} must have strings as keys, got {key!r}.")
        return {str(key): plain(item, f"{what}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{what}[{at}]") for at, item in enumerate(value)]
    raise TypeError(
        f"{what} must be what a ticket's file can hold (numbers, strings, tensors, and lists and "
        f"dicts of them), got {type(value).__name__}."
    )


def digests(
    masks: Masks,
    start: Mapping[str, Any],
    frozen: Mapping[str, Tensor],
    others: Mapping[str, Any],
    draw: bool = True,
) -> dict[str, str]:
    """sha256 of all that makes a ticket, by name; without `draw`, of sources only as they read."""
    tensors = {f"masks.{name}": packed for name, packed in masks.to_bits().items()}
    keys = keys_of(start)
    for name, value in start.items():
        if isinstance(value, Tensor):
            tensors[f"start.{name}"] = value
        elif draw and name in masks and isinstance(value, Seeded | SignOf):
            tensors[f"start.{name}"] = drawn(name, keyed(value, keys[name]), masks[name].shape)
    tensors |= {f"frozen.{name}": value for name, value in frozen.items()}
    # through JSON once, after which keys are strings and sort as they do in a file
    header = json.dumps(json.loads(_header(masks, start, others)), sort_keys=True)
    return {
        HEADER: _of_text(header),
        **{name: _digest(tensor) for name, tensor in tensors.items()},
    }


def differing(
    saved: Saved, now: Mapping[str, str], masks: Masks, start: Mapping[str, Any]
) -> str | None:
    """The part that differs from the saved one, in words; None: none differs or is missing.

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
        return f"the mask of {shown(name)}"
    if part == "frozen":
        return f"what pruned weights of {shown(name)} hold"
    source = start.get(name)
    drawn_by = "" if isinstance(source, Tensor) else f" drawn by {shown(source)}"
    return f"the start of {shown(name)}{drawn_by}"


def _of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _digest(tensor: Tensor) -> str:
    """The sha256 of dtype, shape and bytes."""
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
    """Its message in one line, without a full stop; with no more of the file's words than fit."""
    return shown(" ".join(str(error).split()).rstrip("."), most=400)


def _as_json(name: str, value: Any) -> Any:
    if isinstance(value, str) and value == "zero":
        return value
    if isinstance(value, SignOf):
        return {"constant": value.constant, "sign_of": asdict(value.source)}
    if isinstance(value, Seeded):
        return asdict(value)
    raise TypeError(
        f'the start of {name} must be a tensor, ls.frozen.Seeded, ls.frozen.SignOf or "zero", '
        f"got {type(value).__name__}."
    )


def _from_json(name: str, value: Any) -> Any:
    """The start of a parameter that is a source; the inverse of `_as_json`."""
    if isinstance(value, str):
        if value != "zero":
            raise ValueError(f'the start of {name} in words is "zero", got {value!r}')
        return value
    fields = _expect(dict, value, f"the source of {name}")
    if "sign_of" not in fields:
        return _seeded(name, fields)
    if fields.keys() != {"sign_of", "constant"}:
        raise ValueError(f"the source of {name} must have sign_of and constant, got {[*fields]}")
    source = _expect(dict, fields["sign_of"], f"the source of {name}")
    return SignOf(_seeded(name, source), fields["constant"])


def _seeded(name: str, fields: dict[str, Any]) -> Seeded:
    if fields.keys() != (wanted := {"law", "seed", "std", "stream"}):
        raise ValueError(f"the source of {name} must have {sorted(wanted)}, got {sorted(fields)}")
    return Seeded(**fields)
