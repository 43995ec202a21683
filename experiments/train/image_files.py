"""The files of MNIST, Fashion-MNIST and CIFAR-10: their names, their content checked and parsed.

Every file is checked (magic number, dimensions, exact length, and the SHA-256 of the content where
we know it) before one pixel is used. No file is executed: see `pickled`.
"""

import gzip
import hashlib
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.train import pickled

CLASSES = 10


class DataError(ValueError):
    """A data file is missing, truncated or not what it should be; the message says the way out."""


@dataclass(frozen=True)
class IdxFile:
    """One IDX file of unsigned bytes: its name, its dimensions, and what it must contain."""

    name: str
    shape: tuple[int, ...]
    sha256: str = ""  # of the uncompressed content; "" where we do not know it

    @property
    def size(self) -> int:
        """Length of the uncompressed content in bytes: header (4 + 4 per dimension) and data."""
        return 4 + 4 * len(self.shape) + math.prod(self.shape)


def _four(train: int, test: int, digests: str = " " * 3) -> dict[str, IdxFile]:
    """Images and labels of both parts. digests: of the four, in words."""
    names = ("train", "images"), ("train", "labels"), ("test", "images"), ("test", "labels")
    found = {}
    for (part, what), sha256 in zip(names, digests.split(" "), strict=True):
        count, stem = (train, "train") if part == "train" else (test, "t10k")
        shape, kind = ((count, 28, 28), "idx3") if what == "images" else ((count,), "idx1")
        found[f"{part} {what}"] = IdxFile(f"{stem}-{what}-{kind}-ubyte", shape, sha256)
    return found


MNIST = _four(
    60_000,
    10_000,
    "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db "
    "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5 "
    "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7 "
    "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
)
MNIST_MINI = _four(  # made by make_mnist_mini.py, which prints these digests
    6_000,
    2_000,
    "276107be590759c3f0926df722c4de39cdda1227591a1ecd47a184690a8ebf06 "
    "68a5c4f7f395a30b3c9c1866520c6eee961a3d0347446a56e17e4f65c8dfbbc6 "
    "0a2a978ac97c9ffe5524643f23f15c688c7c4b82e1ce271f4060492e4a74cae4 "
    "601a3cc86da79e5dcf5265d52b4dd14eb2e0ee0c69c9792c036ed8b98dcb05fa",
)
FASHION_MNIST = _four(60_000, 10_000)  # files of MNIST's names

CIFAR10_FOLDER = "cifar-10-batches-bin"
CIFAR10_TRAIN = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
CIFAR10_TEST = "test_batch.bin"
CIFAR10_RECORDS = 10_000  # per file
CIFAR10_SHAPE = (3, 32, 32)
CIFAR10_PICKLED = "cifar-10-batches-py"  # what torchvision leaves, the same images


def parse_idx(content: bytes, file: IdxFile, path: Path) -> np.ndarray:
    """The array in an IDX file, [*file.shape] uint8. Raises DataError if anything is off."""
    header = 4 + 4 * len(file.shape)
    magic = 0x0800 + len(file.shape)  # 0x08: unsigned byte; low byte: number of dimensions
    if len(content) < header:
        raise bad(path, f"holds {len(content)} bytes, expected {file.size}")
    found, *shape = struct.unpack(f">{header // 4}I", content[:header])
    if found != magic:
        raise bad(path, f"starts with magic number {found:#010x}, expected {magic:#010x}")
    if tuple(shape) != file.shape:
        raise bad(path, f"says its dimensions are {tuple(shape)}, expected {file.shape}")
    if len(content) != file.size:
        raise bad(path, f"holds {len(content)} bytes, expected {file.size}")
    digest = hashlib.sha256(content).hexdigest()
    if file.sha256 and digest != file.sha256:
        raise bad(path, f"has SHA-256 {digest}, expected {file.sha256}")
    if not file.sha256 and digest in {known.sha256 for known in MNIST.values()}:
        raise bad(path, "is the file of MNIST, expected another set's")
    return np.frombuffer(content, np.uint8, offset=header).reshape(file.shape)


def cifar10_size() -> int:
    """Bytes of one batch: a label and an image for each record."""
    return CIFAR10_RECORDS * (1 + math.prod(CIFAR10_SHAPE))


def parse_cifar10(content: bytes, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images [10000, 3, 32, 32] and labels [10000] of one binary batch, both uint8.

    There is no digest here: the content is checked by length and label range; the archive that
    --download fetches is checked as a whole.
    """
    expected = cifar10_size()
    if len(content) != expected:
        raise bad(path, f"holds {len(content)} bytes, expected {expected}")
    records = np.frombuffer(content, np.uint8).reshape(CIFAR10_RECORDS, -1)
    return _checked(records[:, 1:], records[:, 0], path)


def parse_pickled_cifar10(content: bytes, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The same, of one batch as `pickle` wrote it: see `pickled`."""
    try:
        found = pickled.arrays_of(content)
    except ValueError as error:
        raise bad(path, f"is not as expected: {error}") from error
    found = found if isinstance(found, dict) else {}
    images, labels = found.get(b"data"), found.get(b"labels")
    shape, count = (CIFAR10_RECORDS, math.prod(CIFAR10_SHAPE)), CIFAR10_RECORDS
    if not isinstance(images, np.ndarray) or images.shape != shape:
        raise bad(path, f"holds no bytes of shape {shape} under b'data', as expected")
    if not isinstance(labels, list) or len(labels) != count or set(map(type, labels)) != {int}:
        raise bad(path, f"holds no list of {count} numbers under b'labels', as expected")
    if not 0 <= min(labels) <= max(labels) < 256:
        raise bad(path, f"holds labels {min(labels)} to {max(labels)}, expected 0 to {CLASSES - 1}")
    return _checked(images, np.array(labels, np.uint8), path)


def _checked(images: np.ndarray, labels: np.ndarray, path: Path) -> tuple[np.ndarray, np.ndarray]:
    images = images.reshape(-1, *CIFAR10_SHAPE)
    if labels.max() >= CLASSES:
        raise bad(path, f"holds the label {labels.max()}, expected labels 0 to {CLASSES - 1}")
    return images, labels


def read_limited(path: Path, limit: int) -> bytes:
    """Content of a plain or .gz file, uncompressed; at most limit + 1 bytes are ever read."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as stream:
            return stream.read(limit + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise bad(
            path, f"is not a whole gzip file ({error}), expected {limit} bytes in it"
        ) from error


def bad(path: Path, what: str) -> DataError:
    return DataError(f"{path} {what}. Delete it, then put a fresh copy there or add --download.")
