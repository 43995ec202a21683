"""Files that appear whole or not at all, and tensors that are read into memory."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import stat
from pathlib import Path
from typing import BinaryIO

import safetensors
import safetensors.torch
from torch import Tensor

from lottery_sparse.text import shown

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# ---- writing -------------------------------------------------------------------------------------


def write_whole(
    path: Path,
    content: bytes,
    guard: contextlib.AbstractContextManager[object] | None = None,
) -> None:
    """Write `path`; a reader sees the old file or the new one, never a part, also after a crash.

    A file that was there keeps its mode; a new one has that of the umask. Of a symbolic link the
    target is written, and the link stays. A device, a pipe or a terminal (/dev/null, /dev/stdout)
    is written to directly, and nothing is replaced. Temporary files that killed writers of this
    path left in its folder are removed.

    Args:
        path: the file, in a folder that exists.
        content: all of it.
        guard: entered around the moment in which the file appears.

    Raises:
        OSError: it could not be written; a file that was there is as it was.
    """
    path = _followed(path)
    if _is_stream(path):
        with guard or contextlib.nullcontext(), _open_stream(path) as stream:
            stream.write(content)
        return
    check_no_folder(path)
    _sweep(path)
    new, file = _temporary_file(path)
    try:
        with file:
            with contextlib.suppress(FileNotFoundError):
                os.chmod(new, stat.S_IMODE(os.stat(path).st_mode))  # before a private one has words
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            if fcntl is None:
                file.close()  # Windows renames no open file
            with guard or contextlib.nullcontext():
                os.replace(new, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new)
        raise
    _sync_folder(path.parent)


def temporary(path: Path) -> str:
    """How the names of files begin that a killed `write_whole` of `path` leaves beside it.

    The prefix has one length whatever the name of the file has, which may be as long as the file
    system allows.
    """
    return f".ls-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}-"


def check_no_folder(path: Path) -> None:
    """Raises IsADirectoryError, which names the path, where a file is needed."""
    if path.is_dir():
        said = "this is a folder, but a file is needed"
        raise IsADirectoryError(errno.EISDIR, said, os.fspath(path))


def _followed(path: Path) -> Path:
    """The target of a symbolic link, or of a chain; the link of a descriptor ends a chain."""
    for _ in range(40):  # as many as Linux follows; the system itself refuses a longer chain
        if not path.is_symlink() or _descriptor(path) is not None:
            break
        path = path.parent / os.readlink(path)
    return path


def _is_stream(path: Path) -> bool:
    """Whether the path can only be written to, as a device, a pipe or a descriptor can."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return False
    return _descriptor(path) is not None or not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _descriptor(path: Path) -> int | None:
    """The number of the descriptor of this process that a path in /proc or /dev/fd stands for."""
    folder = os.path.realpath(path.parent)
    own = folder in (f"/proc/{os.getpid()}/fd", "/dev/fd")
    return int(path.name) if own and path.name.isdecimal() else None


def _open_stream(path: Path) -> BinaryIO:
    number = _descriptor(path)
    if number is None:
        return open(path, "wb")
    # the same open file, so that its position is shared: what was printed to it stays
    return open(os.dup(number), "wb")


def _temporary_file(path: Path) -> tuple[Path, BinaryIO]:
    """A new file beside `path`, which its writer holds a lock on for as long as it is open."""
    while True:
        new = path.parent / f"{temporary(path)}{secrets.token_hex(8)}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)  # of Windows
        # the system itself takes the umask, which cannot be read without setting it
        file = open(os.open(new, flags, 0o666), "wb")  # noqa: SIM115, the caller closes it
        if _locked(file.fileno(), wait=True) is None or new.exists():
            return new, file
        file.close()  # another writer took it for a leftover between these two lines


def _sweep(path: Path) -> None:
    """Remove temporary files of `path` that no writer has open any more."""
    if fcntl is None:
        return
    ours = re.compile(re.escape(temporary(path)) + "[0-9a-f]{16}")
    with contextlib.suppress(OSError):  # a folder that may not be listed
        for left in [name for name in os.listdir(path.parent) if ours.fullmatch(name)]:
            with contextlib.suppress(OSError):  # removed by another, or not ours to remove
                _sweep_one(path.parent / left)


def _sweep_one(left: Path) -> None:
    # some network drives lock only what is open for writing
    mode = os.O_RDWR if os.access(left, os.W_OK) else os.O_RDONLY
    fd = os.open(left, mode | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if stat.S_ISREG(os.fstat(fd).st_mode) and _locked(fd):
            os.unlink(left)
    finally:
        os.close(fd)


def _locked(fd: int, wait: bool = False) -> bool | None:
    """Take the lock of an open file, which ends with the last process that has it open.

    False: another has it. None: there are no locks here (Windows, some network drives).
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _sync_folder(folder: Path) -> None:
    """Make a renaming in it last through a power cut, where the system can."""
    try:
        fd = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders; elsewhere one that may not be listed
        return
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # some file systems
            raise
    finally:
        os.close(fd)


# ---- reading -------------------------------------------------------------------------------------


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, in the order of their names, and its metadata.

    They own their memory: the file is read, not mapped. Who writes to it, or cuts it short, later
    or meanwhile, changes no tensor and kills no process.

    Raises:
        ValueError: the file is no safetensors; the message does not name it.
        OSError: there is no such file, it is a folder, or it cannot be read.
    """
    check_no_folder(Path(path))
    content = Path(path).read_bytes()
    try:
        tensors = safetensors.torch.load(content)
        end = 8 + int.from_bytes(content[:8], "little")
        tensors = {name: tensors[name] for name in sorted(tensors)}  # which safetensors shuffles
        return tensors, json.loads(content[8:end]).get("__metadata__") or {}
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(shown(" ".join(str(error).split()))) from None
    except (KeyError, TypeError) as error:  # a type of numbers that this torch has not
        raise ValueError(f"it holds numbers of a type that is not known here: {error}") from None
