"""Files that appear whole or not at all, and locks between processes."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from lottery_sparse import files

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def write_whole(
    path: Path,
    content: bytes,
    guard: contextlib.AbstractContextManager[object] | None = None,
) -> None:
    """`lottery_sparse.files.write_whole`, which makes the folder too."""
    make_folder(path.parent)
    files.write_whole(path, content, guard)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, where they are missing."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        said = f"{path} cannot be a folder, since it, or what it is in, is a file: give another one"
        raise NotADirectoryError(error.errno, said) from error


@contextlib.contextmanager
def locked(path: Path, shared: bool = False) -> Iterator[int | None]:
    """Hold a lock on the file `path`, making it; yields its descriptor.

    Of all processes and threads one holds it, or several that share it. It ends with its holder,
    however that ends. Where nothing can be written, those who share it go on without (None).
    """
    if fcntl is None:
        raise RuntimeError("a store needs the file locks of Linux or macOS; on Windows, use WSL.")
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError:
        if not shared:
            raise
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            yield None
            return
    try:
        # flock, not lockf: held by the open file, so between threads too, and over NFS as well
        fcntl.flock(fd, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield fd
    finally:
        os.close(fd)


def try_lock(fd: int, shared: bool = False) -> bool:
    """Take the lock of an open file if nobody holds it; it ends when `fd` is closed."""
    assert fcntl is not None  # whoever comes here has been through `locked`
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def write_all(fd: int, content: bytes) -> None:
    """os.write until all of it is written."""
    left = memoryview(content)
    while left:
        left = left[os.write(fd, left) :]
