"""Fetch MNIST or CIFAR-10 on request: over https, capped, checksum-verified, whole or not."""

import hashlib
import tarfile
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from experiments.files import write_whole
from experiments.train import image_files

MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
MNIST_CAP = 16 * 2**20  # bytes; the largest of the four .gz files has 9.9 MB
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_SIZE = 170_052_171
CIFAR10_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
TIMEOUT = 60  # seconds without an answer


def mnist(root: Path) -> None:
    """Put the MNIST files that are missing under root/MNIST/raw, uncompressed."""
    folder = root / "MNIST" / "raw"
    for file in image_files.MNIST.values():
        if any((folder / name).is_file() for name in (file.name, f"{file.name}.gz")):
            continue
        with _fetched(f"{MNIST_URL}{file.name}.gz", folder, MNIST_CAP) as archive:
            content = image_files.read_limited(archive, file.size)
            image_files.parse_idx(
                content, file, archive
            )  # raises if it is not exactly the file we know
        write_whole(folder / file.name, content)


def cifar10(root: Path) -> None:
    """Put the CIFAR-10 binary batches under root/cifar-10-batches-bin if one is missing."""
    folder = root / image_files.CIFAR10_FOLDER
    names = (*image_files.CIFAR10_TRAIN, image_files.CIFAR10_TEST)
    if all((folder / name).is_file() for name in names):
        return
    with _fetched(CIFAR10_URL, folder, CIFAR10_SIZE) as archive:
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        if digest != CIFAR10_SHA256:
            raise image_files.DataError(
                f"{CIFAR10_URL} sent a file with SHA-256 {digest}, expected {CIFAR10_SHA256}; "
                "nothing was kept. Try again, or put the batches there by hand."
            )
        with tarfile.open(archive) as members:
            for name in names:  # by name only: no path in the archive is ever followed
                member = members.extractfile(f"{image_files.CIFAR10_FOLDER}/{name}")
                assert member is not None  # the checksum fixes what is in the archive
                content = member.read()
                image_files.parse_cifar10(content, folder / name)
                write_whole(folder / name, content)


@contextmanager
def _fetched(url: str, folder: Path, cap: int) -> Iterator[Path]:
    """A temporary file with what `url` sends, at most `cap` bytes; removed at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, suffix=Path(url).suffix) as file:
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
                if not response.geturl().startswith("https://"):
                    raise image_files.DataError(
                        f"{url} led to {response.geturl()}, which is not https."
                    )
                _copy(response, file, url, cap)
        except urllib.error.URLError as error:
            raise image_files.DataError(
                f"{url} could not be fetched ({error.reason}). Fetch it on another machine and "
                f"put the files into {folder}."
            ) from error
        yield Path(file.name)


def _copy(source: IO[bytes], target: IO[bytes], url: str, cap: int) -> None:
    received = 0
    while block := source.read(2**20):
        received += len(block)
        if received > cap:
            raise image_files.DataError(
                f"{url} sends more than the {cap} bytes it should; stopped."
            )
        target.write(block)
    target.flush()
