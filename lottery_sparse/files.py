"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from pathlib import Path


def write_whole(
    path: Path,
    content: bytes,
    guard: contextlib.AbstractContextManager[object] | None = None,
) -> None:
    """Write `path`; a reader sees the old file or the new one, never a part, also after a crash.

    A file that was there keeps its mode; a new one has that of the umask.

    Args:
        path: the file, in a folder that exists.
        content: all of it.
        guard: entered around the moment in which the file appears.

    Raises:
        OSError: it could not be written; what was there is as it was.
    """
    new = path.parent / f"{temporary(path)}{secrets.token_hex(8)}"
    # O_BINARY: Windows. The system itself takes the umask, which cannot be read without setting it.
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with open(fd, "wb") as file:
            with contextlib.suppress(FileNotFoundError):
                os.chmod(new, stat.S_IMODE(os.stat(path).st_mode))  # before a private one has words
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        with guard or contextlib.nullcontext():
            os.replace(new, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new)
        raise
    _sync_folder(path.parent)


def temporary(path: Path) -> str:
    """How the names of files begin that a killed `write_whole` of `path` leaves beside it."""
    return f".{path.name}."


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
