"""Lines of JSON with a checksum in a file that is only ever appended to."""

import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

from experiments.files import write_all

CHECKSUM = "checksum"


def canonical(value: Any) -> str:
    """The one text of a JSON value: sorted keys, no spaces, floats by repr, no NaN or infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def checksum(entry: dict[str, Any]) -> str:
    return hashlib.sha256(canonical(entry).encode()).hexdigest()[:16]


def line_of(entry: dict[str, Any]) -> str:
    """The line of an entry, with its checksum."""
    return canonical(entry | {CHECKSUM: checksum(entry)}) + "\n"


def without_checksum(line: bytes) -> dict[str, Any]:
    """The entry of a line; ValueError if it is not one, or its checksum is wrong."""
    try:
        entry = json.loads(line)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(entry, dict) or entry.pop(CHECKSUM, None) != checksum(entry):
        raise ValueError("its checksum is wrong")
    return entry


class Lines:
    """One such file. What has been read is kept, so that reading again reads only what is new.

    Attributes:
        found: (line number, entry) of each line that is as it was written.
    """

    def __init__(self, path: Path):
        self.path = path
        self.found: list[tuple[int, dict[str, Any]]] = []
        self._forget()

    def _forget(self) -> None:
        self.found.clear()
        self._inode = self._read = self._count = 0  # file, bytes and lines read
        self._last = b""  # the last line read, to know the file again

    def read(self, end: int | None = None) -> bool:
        """Read whole lines up to byte `end`; False: it is another file, read from its start.

        Warns of lines that are not as they were written, by number.
        """
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            again = not self._inode
            self._forget()
            return again
        try:
            status = os.fstat(fd)
            end = status.st_size if end is None else end
            at = self._read - len(self._last)
            again = status.st_ino == self._inode and end >= self._read
            again = again and os.pread(fd, len(self._last), at) == self._last
            if not again:
                self._forget()
                self._inode = status.st_ino
            content = self.after(self._read)[: end - self._read]
        finally:
            os.close(fd)
        for line in content.split(b"\n")[:-1]:
            self._count += 1
            self._last = line + b"\n"
            self._read += len(self._last)
            try:
                self.found.append((self._count, without_checksum(line)))
            except ValueError as error:
                warnings.warn(
                    f"{self.path} line {self._count} is not as it was written ({error}): not used.",
                    stacklevel=2,
                )
        return again

    def size(self) -> int:
        try:
            return os.stat(self.path).st_size
        except FileNotFoundError:
            return 0

    def after(self, at: int) -> bytes:
        """What comes after byte `at`."""
        try:
            with self.path.open("rb") as file:
                file.seek(max(0, at))
                return file.read()
        except FileNotFoundError:
            return b""

    def whole(self) -> int:
        """Where its last whole line ends."""
        size = self.size()
        if self.after(size - 1) in (b"", b"\n"):
            return size
        return self.path.read_bytes().rfind(b"\n") + 1

    def append(self, content: bytes) -> None:
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            write_all(fd, content)
            os.fsync(fd)
        finally:
            os.close(fd)

    def cut(self, at: int, keep: bool = False) -> None:
        """Let the file end at byte `at`; `keep`: with what it loses in a file beside it."""
        lost = self.after(at)
        if lost and keep:
            Lines(self.path.with_name(f"{self.path.name}.torn")).append(lost)
        if lost:
            os.truncate(self.path, at)
