"""Who works on which run: a file per run that its worker holds, and that ends with the worker.

A lease is taken under the lock of the store. Its holder touches the file now and then, and keeps it
locked. It counts as left behind once it has not been touched for `STALE` seconds (by the clock of
the file system), or at once where the holder's machine is this one and nobody locks the file. Who
takes over replaces the file, so that its former holder, should it wake up, finds another token and
is refused: `LeaseLost`.
"""

import contextlib
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

from experiments.files import try_lock, write_all

HEARTBEAT = 20.0  # seconds between two touches
STALE = 120.0  # seconds without a touch after which a lease may be taken over


class LeaseLost(RuntimeError):
    """Another worker took the run over, or the lease was given back: nothing was written."""


class Lease:
    """The right to write what belongs to some runs, until it is released.

    Attributes:
        lost: another worker has taken over, noticed at a heartbeat; what is left can stop.
    """

    def __init__(self, leases: "Leases", token: str, files: dict[str, int]):
        self.run_ids = frozenset(files)
        self.token = token
        self.lost = False
        self._leases = leases
        self._files = files  # run id -> open, locked file
        self._ended = threading.Event()
        self._heartbeat = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._heartbeat.start()

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT):
            self.touch()

    def touch(self) -> None:
        """Say that its holder is alive."""
        for fd in self._files.values():
            try:
                os.utime(fd)
                self.lost |= os.fstat(fd).st_nlink == 0
            except OSError:
                pass  # a server that is away for a moment; whether the lease holds is asked later

    def release(self) -> None:
        """Give it back; does nothing the second time."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._heartbeat.join()
        try:
            self._leases.release(self)
        finally:
            for fd in self._files.values():
                os.close(fd)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


class Leases:
    """The leases of a store.

    Args:
        lock: gives the lock of the store, exclusive or shared.
    """

    def __init__(self, folder: Path, lock: Callable[[bool], AbstractContextManager[int | None]]):
        self._folder = folder
        self._lock = lock

    def claim(self, run_ids: Iterable[str]) -> Lease | None:
        wanted = sorted(set(run_ids))
        if not wanted:
            raise ValueError("a lease is of at least one run, got none.")
        for run_id in wanted:
            if not re.fullmatch(r"\w[\w.-]*", run_id, re.ASCII):
                raise ValueError(
                    f"a run id is made of letters, digits, '_', '-' and '.', got {run_id!r}."
                )
        token = secrets.token_hex(8)
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
        content = json.dumps(owner | {"boot": _boot(), "token": token}).encode() + b"\n"
        files: dict[str, int] = {}
        with self._lock(False) as lock:
            now = _now(lock)
            if any(self._holder(run_id, now) for run_id in wanted):
                return None
            self._folder.mkdir(exist_ok=True)
            try:
                for run_id in wanted:
                    files[run_id] = self._take(run_id, content)
            except BaseException:
                for run_id, fd in files.items():
                    os.close(fd)  # first: the lock on it is what others look at
                    with contextlib.suppress(OSError):
                        os.unlink(self._folder / run_id)
                raise
        return Lease(self, token, files)

    def _take(self, run_id: str, content: bytes) -> int:
        path, new = self._folder / run_id, self._folder / f".{run_id}"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new)  # of a claimant that was killed right here
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        fd = os.open(new, flags, 0o666)
        try:
            try_lock(fd)
            write_all(fd, content)
            os.replace(new, path)
        except BaseException:
            os.close(fd)
            with contextlib.suppress(OSError):
                os.unlink(new)
            raise
        return fd

    def _holder(self, run_id: str, now: float) -> dict[str, Any] | None:
        """The owner of a run that somebody works on."""
        try:
            fd = os.open(self._folder / run_id, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            owner = _owner(fd)
            silent = now - os.fstat(fd).st_mtime
            if silent > STALE:
                return None
            here = owner.get("boot") == _boot()
            if here and try_lock(fd, shared=True):
                return None
            return owner | {"silent": 0.0 if here else silent}
        finally:
            os.close(fd)

    def check(self, lease: Lease, run_id: str) -> None:
        """Raise LeaseLost unless the lease holds for the run; the store must be locked."""
        if run_id not in lease.run_ids:
            raise ValueError(f"the lease is of other runs than {run_id}: claim it with them.")
        if not self._is_of(lease, run_id):
            lease.lost = True
            raise LeaseLost(
                f"the lease of {run_id} is no longer ours: another worker took over after "
                f"{STALE:g} s without a sign of life, or it was released. Nothing was written."
            )

    def _is_of(self, lease: Lease, run_id: str) -> bool:
        try:
            fd = os.open(self._folder / run_id, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            return _owner(fd).get("token") == lease.token
        finally:
            os.close(fd)

    def release(self, lease: Lease) -> None:
        # what cannot be given back now is taken over later
        with contextlib.suppress(OSError), self._lock(False):
            for run_id in lease.run_ids:
                if self._is_of(lease, run_id):
                    os.unlink(self._folder / run_id)

    def holders(self) -> dict[str, dict[str, Any]]:
        """run id -> host, pid and since (UTC) of the worker that is on it."""
        with self._lock(True) as lock:
            now = _now(lock)
            return {
                run_id: {name: owner.get(name) for name in ("host", "pid", "since", "silent")}
                for run_id in self._names()
                if (owner := self._holder(run_id, now))
            }

    def _names(self) -> Iterator[str]:
        if self._folder.is_dir():
            yield from sorted(name for name in os.listdir(self._folder) if not name.startswith("."))


def _owner(fd: int) -> dict[str, Any]:
    try:
        owner = json.loads(os.pread(fd, 4096, 0))
    except (ValueError, RecursionError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _now(lock: int | None) -> float:
    """The time by the clock that stamps the files: another machine's, on a network file system."""
    if lock is not None:
        with contextlib.suppress(OSError):
            os.utime(lock)
            return os.fstat(lock).st_mtime
    return time.time()


def _boot() -> str:
    """Names this machine since it was started: its containers share it, as they share locks."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
