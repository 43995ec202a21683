"""MNIST and CIFAR-10 as device tensors, read from a folder in the layout that torchvision uses.

    DIR/MNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte   (plain or with .gz)
    DIR/cifar-10-batches-bin/{data_batch_1..5,test_batch}.bin    (the binary version)

`image_files` checks every file before one pixel is used.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import lottery_sparse as ls
from experiments.train import download as fetching
from experiments.train.image_files import (
    CIFAR10_FOLDER,
    CIFAR10_TEST,
    CIFAR10_TRAIN,
    CLASSES,
    MNIST,
    MNIST_MINI,
    DataError,
    IdxFile,
    cifar10_size,
    parse_cifar10,
    parse_idx,
    read_limited,
)

HERE = Path(__file__).resolve().parents[1]  # experiments


@dataclass(frozen=True)
class Split:
    images: Tensor  # [n, channels, height, width], float32 in [0, 1]
    labels: Tensor  # [n], int64

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Dataset:
    """A set on one device, divided as in the paper: the validation part is taken from train."""

    name: str
    source: Path
    train: Split
    val: Split
    test: Split

    @property
    def device(self) -> torch.device:
        return self.train.images.device


def load(
    name: str,
    data_dir: str | Path | None = None,
    device: torch.device | str = "cpu",
    download: bool = False,
) -> Dataset:
    """Read a set onto `device`.

    Args:
        name: a key of DATASETS.
        data_dir: the folder that holds MNIST/raw or cifar-10-batches-bin; without it,
            the environment variable LS_DATA_DIR. Not needed for mnist-mini.
        device: where all images and labels are kept.
        download: fetch what is missing into that folder first, over https and checksum-verified.

    Raises:
        DataError: unknown name, no folder given, a file missing or not what it should be.
    """
    if name not in DATASETS:
        raise DataError(f"dataset is one of {', '.join(DATASETS)}; got {name!r}.")
    if name == "mnist-mini":
        return _load_mnist(name, HERE / "mnist_mini", MNIST_MINI, device)
    root = data_root(data_dir)
    if root is None:
        raise DataError(
            f"{name} needs a folder: give --data-dir DIR or set LS_DATA_DIR (as torchvision lays "
            "it out: DIR/MNIST/raw, DIR/cifar-10-batches-bin); --download fills it."
        )
    if download:
        fetching.mnist(root) if name == "mnist" else fetching.cifar10(root)
    if name == "mnist":
        return _load_mnist(name, root / "MNIST" / "raw", MNIST, device)
    return _load_cifar10(root / CIFAR10_FOLDER, device)


def data_root(data_dir: str | Path | None) -> Path | None:
    """The folder given, else the one LS_DATA_DIR names, else None."""
    chosen = data_dir or os.environ.get("LS_DATA_DIR")
    return Path(chosen).expanduser() if chosen else None


def has_mnist(data_dir: str | Path | None) -> bool:
    """True if all four full MNIST files are in the folder (nothing is read or checked)."""
    root = data_root(data_dir)
    return root is not None and not _missing(root / "MNIST" / "raw", MNIST)


def batches(count: int, batch_size: int, seed: int, epoch: int) -> Tensor:
    """Indices of one epoch's batches, [count // batch_size, batch_size], int64.

    A function of (seed, epoch) alone, so every round of a run sees the same batches in the same
    order. What does not fill a batch at the end of the shuffled epoch is dropped.
    """
    if not 1 <= batch_size <= count:
        raise ValueError(f"batch_size must be between 1 and the {count} images, got {batch_size}.")
    stream = ls.random.stream_of("batch order")
    order = ls.random.permutation(count, seed, stream, step=epoch)
    return order[: count - count % batch_size].view(-1, batch_size)


def permuted(dataset: Dataset, kind: str) -> Dataset:
    """The set with its "pixels" or "classes" permuted, the same way in every image and run.

    Pixels keep their channels together. "none" gives the set itself.

    Raises:
        ValueError: another kind.
    """
    if kind == "none":
        return dataset
    if kind == "pixels":
        height, width = dataset.train.images.shape[-2:]
        order = _fixed_order("permuted pixels", height * width)

        def change(split: Split) -> Split:
            flat = split.images.flatten(2)
            images = flat.index_select(2, order.to(flat.device)).view_as(split.images)
            return replace(split, images=images)

    elif kind == "classes":
        order = _fixed_order("permuted classes", CLASSES)

        def change(split: Split) -> Split:
            return replace(split, labels=order.to(split.labels.device)[split.labels])

    else:
        raise ValueError(f"permuted must be none, pixels or classes; got {kind!r}.")
    return replace(
        dataset, train=change(dataset.train), val=change(dataset.val), test=change(dataset.test)
    )


def _fixed_order(name: str, count: int) -> Tensor:
    return ls.random.permutation(count, seed=0, stream=ls.random.stream_of(name))


def _variants(folder: Path, name: str) -> tuple[Path, Path]:
    return folder / name, folder / f"{name}.gz"


def _missing(folder: Path, files: dict[str, IdxFile]) -> list[str]:
    names = (file.name for file in files.values())
    return [name for name in names if not any(path.is_file() for path in _variants(folder, name))]


def _not_found(name: str, folder: Path, missing: list[str]) -> DataError:
    return DataError(
        f"{name} was not found: {folder} has no {', '.join(missing)}; give the right folder with "
        "--data-dir or LS_DATA_DIR, or add --download."
    )


def _load_mnist(
    name: str, folder: Path, files: dict[str, IdxFile], device: torch.device | str
) -> Dataset:
    if missing := _missing(folder, files):
        raise _not_found(name, folder, [f"{file}[.gz]" for file in missing])
    arrays = {}
    for part, file in files.items():
        path = next(path for path in _variants(folder, file.name) if path.is_file())
        arrays[part] = parse_idx(read_limited(path, file.size), file, path)
    return _divide(
        name,
        folder,
        (arrays["train images"][:, None], arrays["train labels"]),
        (arrays["test images"][:, None], arrays["test labels"]),
        device,
    )


def _load_cifar10(folder: Path, device: torch.device | str) -> Dataset:
    paths = [folder / name for name in (*CIFAR10_TRAIN, CIFAR10_TEST)]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise _not_found("cifar10", folder, missing)
    size = cifar10_size()
    *train, test = (parse_cifar10(read_limited(path, size), path) for path in paths)
    images, labels = (np.concatenate(parts) for parts in zip(*train, strict=True))
    return _divide("cifar10", folder, (images, labels), test, device)


def _divide(
    name: str,
    source: Path,
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    device: torch.device | str,
) -> Dataset:
    """Take the validation part out of train, once and for all seeds: numpy seed 0, no repeats.

    5,000 images as in the paper; from mnist-mini the same share (1/12).
    """
    images, labels = train
    count = len(labels)
    size = 5_000 if count >= 50_000 else count // 12
    held_out = np.zeros(count, bool)
    held_out[np.random.RandomState(0).choice(count, size, replace=False)] = True

    def split(images: np.ndarray, labels: np.ndarray) -> Split:
        # Divided by 255 only: the paper's scripts use neither mean nor standard deviation.
        pixels = torch.tensor(images).to(device).float().div_(255)
        return Split(pixels, torch.tensor(labels).to(device).long())

    return Dataset(
        name,
        source,
        train=split(images[~held_out], labels[~held_out]),
        val=split(images[held_out], labels[held_out]),
        test=split(*test),
    )


DATASETS = {
    "mnist": "55,000 / 5,000 / 10,000 digits of 28x28, from --data-dir",
    "mnist-mini": "5,500 / 500 / 2,000 of them, shipped in experiments/mnist_mini",
    "cifar10": "45,000 / 5,000 / 10,000 colour images of 32x32, from --data-dir",
}
