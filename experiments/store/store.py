"""What runs leave behind, in a folder that may be read, copied and resumed at any moment.

    store.json                          {"format": 1}
    rows.jsonl                          results of runs, one line per round; no time, no host
    curves.jsonl                        validation losses and accuracies behind rows; as rows.jsonl
    runs.jsonl                          how they came about: seconds, machine, versions, attempts
    leases/<run id>                     who is on which run now (leases.py)
    checkpoints/<run id>.safetensors    the newest one of each run
    checkpoints/<run id>.part.safetensors   that of a round in flight
    store.lock                          the lock of all writers; holds what is being appended

Lines carry a checksum and are only ever appended. All lines of one call appear, in all files, or
none: what is appended is first written into store.lock, and the next one to lock the store cuts off
what a killed writer left unfinished (its bytes go to *.torn).
"""

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from experiments.files import locked, write_all, write_whole
from experiments.store.leases import Lease, Leases
from experiments.store.lines import Lines, canonical, line_of, without_checksum
from lottery_sparse.files import read_tensors, temporary

FORMAT = 1
ROWS, CURVES, RUNS = "rows.jsonl", "curves.jsonl", "runs.jsonl"

Entry = dict[str, Any]


class OtherNumbers(ValueError):
    """A row of a run was made again, and came out otherwise."""

    def __init__(self, run_id: str, text: str):
        super().__init__(text)
        self.run_id = run_id


class Store:
    """The folder of results. Cheap to open; every process opens it for itself.

    Raises:
        FileNotFoundError: there is none and `create` is False.
        ValueError: the folder is something else, or of another format.
        OSError: it cannot be written. What is stored stays as it was, and a restart goes on.
    """

    def __init__(self, folder: Path, create: bool = True):
        self.folder = Path(folder)
        self._lines = {name: Lines(self.folder / name) for name in (ROWS, CURVES, RUNS)}
        self._known: dict[str, dict[tuple[str, int], Entry]] = {ROWS: {}, CURVES: {}}
        self._leases = Leases(self.folder / "leases", self._locked)
        self._open(create)

    def _open(self, create: bool) -> None:
        path = self.folder / "store.json"
        if path.exists():
            try:
                found = json.loads(path.read_bytes()).get("format")
            except (ValueError, AttributeError, RecursionError):
                raise ValueError(f"{path} is not that of a store: give another folder.") from None
            if found != FORMAT:
                raise ValueError(
                    f"{path} is of format {found}, this version reads format {FORMAT}: give "
                    "another folder, or use the version that wrote it."
                )
        elif not create:
            raise FileNotFoundError(
                f"{self.folder} is no store of results (no store.json in it): give its folder with "
                "--store, or make one by `python -m experiments run STUDY`."
            )
        elif any((self.folder / name).exists() for name in self._lines):
            raise ValueError(f"{self.folder} holds results but no store.json: give another folder.")
        else:
            with _in_words(path):
                write_whole(path, canonical({"format": FORMAT}).encode() + b"\n")

    @contextlib.contextmanager
    def _locked(self, shared: bool = False) -> Iterator[int | None]:
        with locked(self.folder / "store.lock", shared) as lock:
            if not shared:
                assert lock is not None
                self._recover(lock)
            yield lock

    # reading

    def rows(self) -> list[Entry]:
        """The results in the order of the file, one per (run_id, round).

        Warns, by line number, of lines whose checksum is wrong and of those that contradict an
        earlier line; they are not used.
        """
        return self._entries(ROWS)

    def curves(self) -> list[Entry]:
        """What `records.curve_of` says of rows, read as `rows` are. Old rows have none."""
        return self._entries(CURVES)

    def _entries(self, name: str) -> list[Entry]:
        with self._locked(shared=True) as lock:
            self._update(lock, name)
        return [dict(entry) for entry in self._known[name].values()]

    def records(self) -> list[dict[str, Any]]:
        """How the rows came about: the verified lines of runs.jsonl."""
        with self._locked(shared=True) as lock:
            lines = self._lines[RUNS]
            lines.read(self._ends(lock).get(RUNS))
        return [dict(record) for _, record in lines.found]

    def rounds_done(self, run_id: str) -> set[int]:
        with self._locked(shared=True) as lock:
            self._update(lock, ROWS)
        return {number for run, number in self._known[ROWS] if run == run_id}

    def _update(self, lock: int | None, name: str) -> None:
        lines, known = self._lines[name], self._known[name]
        before = len(lines.found)
        if not lines.read(self._ends(lock).get(name)):  # another file than last time
            before = 0
            known.clear()
        for number, entry in lines.found[before:]:
            key = entry["run_id"], entry["round"]
            if known.setdefault(key, entry) != entry:
                warnings.warn(
                    f"{lines.path} line {number} contradicts an earlier line of the same run and "
                    f"round ({_differences(known[key], entry)}): not used.",
                    stacklevel=4,
                )

    # writing

    def add(
        self,
        lease: Lease,
        rows: Sequence[Entry],
        records: Sequence[Entry],
        curves: Sequence[Entry] = (),
    ) -> None:
        """Append rows, curves and records of runs that the lease covers: all of them or none.

        A row or curve that is there already is skipped, also where later code says more of it.

        Raises:
            LeaseLost: another worker has taken a run over.
            OtherNumbers: a row or curve is there already with other numbers.
            ValueError: a number is not finite.
        """
        with _in_words(self.folder / ROWS), self._locked() as lock:
            assert lock is not None
            for run_id in {entry["run_id"] for entry in (*rows, *curves, *records)}:
                self._leases.check(lease, run_id)
            texts = {
                ROWS: self._new(lock, ROWS, rows),
                CURVES: self._new(lock, CURVES, curves) if curves else "",
                RUNS: "".join(map(line_of, records)),
            }
            self._append(lock, {name: text for name, text in texts.items() if text})

    def _new(self, lock: int, name: str, entries: Sequence[Entry]) -> str:
        """The lines of those entries that the file does not have."""
        self._update(lock, name)
        new: dict[tuple[str, int], Entry] = {}
        for entry in entries:
            key = entry["run_id"], entry["round"]
            known = self._known[name].get(key) or new.get(key)
            if known is None:
                new[key] = entry
            elif not _agree(known, entry):
                raise OtherNumbers(
                    key[0],
                    f"run {key[0]} round {key[1]} is stored with other numbers "
                    f"({_differences(known, entry)}): either it was made on a machine of other "
                    "arithmetic (make its chain anew, as a whole, with --remake), or its code "
                    "changed and runs.SCHEMA did not.",
                )
        return "".join(map(line_of, new.values()))

    def _append(self, lock: int, texts: dict[str, str]) -> None:
        if not texts:
            return
        plan = {name: [self._lines[name].size(), text] for name, text in texts.items()}
        try:
            os.lseek(lock, 0, os.SEEK_SET)
            write_all(lock, line_of(plan).encode())
            os.fsync(lock)
            for name, text in texts.items():
                self._lines[name].append(text.encode())
        except BaseException:
            for name, (size, _) in plan.items():
                self._lines[name].cut(size)
            os.ftruncate(lock, 0)
            raise
        os.ftruncate(lock, 0)

    # after a writer that was killed

    def _recover(self, lock: int) -> None:
        """Cut off what a killed writer left, keeping its bytes beside the file."""
        for name, end in self._ends(lock).items():
            self._lines[name].cut(end, keep=True)
        if os.fstat(lock).st_size:
            os.ftruncate(lock, 0)
        for lines in self._lines.values():
            lines.cut(lines.whole(), keep=True)

    def _ends(self, lock: int | None) -> dict[str, int]:
        """Where the files that a killed writer was appending to ended before."""
        if lock is None or not (size := os.fstat(lock).st_size):
            return {}
        try:
            plan = without_checksum(os.pread(lock, size, 0))
        except ValueError:
            return {}  # it was killed before it appended anything
        tails = {name: self._lines[name].after(at) for name, (at, _) in plan.items()}
        wanted = {name: text.encode() for name, (_, text) in plan.items()}
        if tails == wanted or any(not wanted[name].startswith(tails[name]) for name in plan):
            return {}  # it had finished, or these are other files by now
        return {name: at for name, (at, _) in plan.items()}

    # checkpoints

    def save(
        self,
        lease: Lease,
        run_id: str,
        tensors: dict[str, Tensor],
        metadata: dict[str, Any],
        part: bool = False,
    ) -> None:
        """Replace the checkpoint of a run that the lease covers. Metadata is JSON.

        part: that of a round in flight, which lies beside the one that the round goes on from.
        """
        path = self._checkpoint(run_id, part)
        # copies, since safetensors refuses tensors that share memory or are not contiguous
        tensors = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }
        header = {"metadata": canonical(metadata)}
        header["sha256"] = _digest(header["metadata"], tensors)
        with _in_words(path):
            self._sweep(path)
            write_whole(path, safetensors.torch.save(tensors, header), self._holding(lease, run_id))

    def load(
        self, run_id: str, part: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The checkpoint of a run; None if there is none, or (with a warning) a broken one."""
        path = self._checkpoint(run_id, part)
        try:
            tensors, header = read_tensors(path)
            if header["sha256"] != _digest(header["metadata"], tensors):
                raise ValueError("its checksum is wrong")
            return tensors, json.loads(header["metadata"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, RecursionError) as error:
            warnings.warn(f"{path} is broken ({error}): it is not used.", stacklevel=2)
            return None

    def metadata(self, run_id: str) -> dict[str, Any] | None:
        """That of the checkpoint of a run, without reading its tensors; None if there is none."""
        try:
            with safetensors.safe_open(self._checkpoint(run_id), framework="pt") as file:
                return json.loads((file.metadata() or {})["metadata"])
        except (
            FileNotFoundError, safetensors.SafetensorError, ValueError, KeyError, RecursionError,
        ):  # fmt: skip
            return None  # `load` says what is wrong with a broken one

    def discard(self, lease: Lease, run_id: str, part: bool = False) -> None:
        """Remove the checkpoint of a run, and what killed writers left of it."""
        path = self._checkpoint(run_id, part)
        with _in_words(path), self._holding(lease, run_id):
            self._sweep(path)
            path.unlink(missing_ok=True)

    def _sweep(self, path: Path) -> None:
        for left in path.parent.glob(f"{temporary(path)}*"):
            left.unlink(missing_ok=True)

    def _checkpoint(self, run_id: str, part: bool = False) -> Path:
        name = f"{run_id}.part" if part else run_id
        return self.folder / "checkpoints" / f"{name}.safetensors"

    @contextlib.contextmanager
    def _holding(self, lease: Lease, run_id: str) -> Iterator[None]:
        with self._locked():
            self._leases.check(lease, run_id)
            yield

    # leases

    def claim(self, run_ids: Iterable[str]) -> Lease | None:
        """The lease of all the runs, or None if one of them is being worked on.

        It is a context manager, and alive until it is released or the process ends.
        """
        with _in_words(self.folder / "leases"):
            return self._leases.claim(run_ids)

    def holders(self) -> dict[str, dict[str, Any]]:
        """run id -> host, pid and since (UTC) of the worker that is on it."""
        return self._leases.holders()


@contextlib.contextmanager
def _in_words(path: Path) -> Iterator[None]:
    try:
        yield
    except NotADirectoryError:
        raise  # it says what to do
    except OSError as error:
        said = OSError(
            f"{path} cannot be written ({error.strerror or error}): nothing of this was stored, "
            "and what was stored before is whole. Make room or make it writable, then start again."
        )
        said.errno = error.errno
        raise said from error


def _digest(metadata: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(metadata.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _agree(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether the new entry says all that the old one does, and the same."""
    return canonical(old) == canonical({name: new[name] for name in old if name in new})


def _differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    return ", ".join(
        f"{name}: {old.get(name)!r} stored, {new.get(name)!r} now"
        for name in sorted(old.keys() | new.keys())
        if canonical(old.get(name)) != canonical(new.get(name))
    )
