"""Data sets as device tensors: files in the layout that torchvision uses, or somebody else's.

    DIR/MNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte   (plain or with .gz)
    DIR/FashionMNIST/raw/...                                     (the same names)
    DIR/cifar-10-batches-bin/{data_batch_1..5,test_batch}.bin    (the binary version)
    DIR/cifar-10-batches-py/{data_batch_1..5,test_batch}         (the pickled one)

`image_files` checks every file before one pixel is used.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import lottery_sparse as ls
from experiments.study import parts
from experiments.train import download as fetching
from experiments.train import image_files as files
from experiments.train.image_files import CLASSES, DataError, IdxFile

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

    @property
    def classes(self) -> int:
        return 1 + max(int(part.labels.max()) for part in (self.train, self.val, self.test))


def load(
    name: str,
    data_dir: str | Path | None = None,
    device: torch.device | str = "cpu",
    download: bool = False,
) -> Dataset:
    """Read a set onto `device`.

    Args:
        name: a key of DATASETS, or "module:attr": a `Dataset`, three pairs (images, labels) to
            train, validate and test, or a function that gives one of these.
        data_dir: the folder that holds the folders above; without it, the environment variable
            LS_DATA_DIR. Not needed for mnist-mini.
        device: where all images and labels are kept.
        download: fetch what is missing into that folder first, over https and checksum-verified.

    Raises:
        DataError: unknown name, no folder given, a file missing or not what it should be.
    """
    if parts.is_path(name):
        return _outside(name, device)
    if name not in DATASETS:
        known = ", ".join(DATASETS)
        raise DataError(f"dataset is one of {known}, or MODULE:ATTR; got {name!r}.")
    if name == "mnist-mini":
        return _load_idx(name, HERE / "mnist_mini", files.MNIST_MINI, device)
    root = data_root(data_dir)
    if root is None:
        raise DataError(
            f"{name} needs a folder: give --data-dir DIR or set LS_DATA_DIR (as torchvision lays "
            f"it out: {FOLDERS[name]})"
            + ("." if name == "fashion-mnist" else "; --download fills it.")
        )
    if download:
        if name == "fashion-mnist":
            raise DataError(
                "fashion-mnist is not downloaded, since no server has it over https with digests: "
                "put its four files into DIR/FashionMNIST/raw, as torchvision does."
            )
        fetching.mnist(root) if name == "mnist" else fetching.cifar10(root)
    if name == "cifar10":
        return _load_cifar10(root, device)
    its = files.MNIST if name == "mnist" else files.FASHION_MNIST
    folder = root / FOLDERS[name].removeprefix("DIR/")
    return _load_idx(name, folder, its, device)


def data_root(data_dir: str | Path | None) -> Path | None:
    """The folder given, else the one LS_DATA_DIR names, else None."""
    chosen = data_dir or os.environ.get("LS_DATA_DIR")
    return Path(chosen).expanduser() if chosen else None


def has_mnist(data_dir: str | Path | None) -> bool:
    """True if all four full MNIST files are in the folder (nothing is read or checked)."""
    root = data_root(data_dir)
    return root is not None and not _missing(root / "MNIST" / "raw", files.MNIST)


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
    fetched = "" if name == "fashion-mnist" else ", or add --download"
    return DataError(
        f"{name} was not found: {folder} has no {', '.join(missing)}; give the right folder with "
        f"--data-dir or LS_DATA_DIR{fetched}."
    )


def _load_idx(
    name: str, folder: Path, its: dict[str, IdxFile], device: torch.device | str
) -> Dataset:
    if missing := _missing(folder, its):
        raise _not_found(name, folder, [f"{file}[.gz]" for file in missing])
    arrays = {}
    for part, file in its.items():
        path = next(path for path in _variants(folder, file.name) if path.is_file())
        arrays[part] = files.parse_idx(files.read_limited(path, file.size), file, path)
        if "labels" in part and arrays[part].max() >= CLASSES:
            raise files.bad(path, f"holds the label {arrays[part].max()}, expected labels 0 to 9")
    train, test = (
        (arrays[f"{part} images"][:, None], arrays[f"{part} labels"]) for part in ("train", "test")
    )
    return _divide(name, folder, train, test, device)


def _load_cifar10(root: Path, device: torch.device | str) -> Dataset:
    """From the binary version, or else from the pickled one."""
    folder, names = root / files.CIFAR10_FOLDER, (*files.CIFAR10_TRAIN, files.CIFAR10_TEST)
    pickled = root / files.CIFAR10_PICKLED
    paths = [pickled / name.removesuffix(".bin") for name in names]
    size, parse = files.cifar10_size() + 2**21, files.parse_pickled_cifar10  # names of images, too
    if not all(path.is_file() for path in paths):
        paths = [folder / name for name in names]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise _not_found("cifar10", folder, missing)
    if paths[0].parent == folder:
        size, parse = files.cifar10_size(), files.parse_cifar10
    *train, test = (parse(files.read_limited(path, size), path) for path in paths)
    images, labels = (np.concatenate(its) for its in zip(*train, strict=True))
    return _divide("cifar10", paths[0].parent, (images, labels), test, device)


def _outside(path: str, device: torch.device | str) -> Dataset:
    """The data set that "module:attr" names, on `device`."""
    found = parts.attribute(path, "dataset")
    if callable(found) and not isinstance(found, Dataset):
        try:
            found = found()
        except Exception as error:
            raise DataError(f"dataset {path} cannot be made ({parts.said(error)}).") from error
    if isinstance(found, Dataset):
        found = [(part.images, part.labels) for part in (found.train, found.val, found.test)]
    wanted = "three pairs (images, labels), to train, validate and test"
    if not isinstance(found, Sequence) or len(found) != 3 or isinstance(found, str):
        size = f" of {len(found)}" if isinstance(found, Sequence) else ""
        raise DataError(f"dataset {path} must give {wanted}; got {parts.kind(found)}{size}.")
    splits = []
    for what, pair in zip(("train", "validate", "test"), found, strict=True):
        told = f"dataset {path} must give images [n, channels, height, width], uint8 or floats,"
        told += f" and labels [n] from 0 on, whole numbers, to {what}; got "
        if not isinstance(pair, Sequence) or len(pair) != 2 or isinstance(pair, str):
            raise DataError(f"{told}{parts.kind(pair)}.")
        images, labels = pair
        if not _is_split(images, labels):
            raise DataError(f"{told}{parts.kind(images)} and {parts.kind(labels)}.")
        if images.shape[1:] != found[0][0].shape[1:]:
            shapes = f"{list(found[0][0].shape[1:])} and {list(images.shape[1:])}"
            raise DataError(f"dataset {path} must give images of one shape; got {shapes}.")
        pixels = images.to(device)
        pixels = pixels.float().div_(255) if images.dtype == torch.uint8 else pixels.float()
        splits.append(Split(pixels, labels.to(device).long()))
    return Dataset(path, Path(), *splits)


def _is_split(images: object, labels: object) -> bool:
    if not (isinstance(images, Tensor) and isinstance(labels, Tensor)):
        return False
    whole = not labels.is_floating_point() and labels.dtype != torch.bool
    pixels = images.dtype == torch.uint8 or images.is_floating_point()
    fits = images.dim() == 4 and labels.shape == images.shape[:1] and len(images) > 0
    return fits and whole and pixels and int(labels.min()) >= 0 and bool(images.isfinite().all())


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


FOLDERS = {
    "mnist": "DIR/MNIST/raw",
    "fashion-mnist": "DIR/FashionMNIST/raw",
    "cifar10": f"DIR/{files.CIFAR10_FOLDER} or DIR/{files.CIFAR10_PICKLED}",
}
DATASETS = {
    "mnist": "55,000 / 5,000 / 10,000 digits of 28x28, from --data-dir",
    "fashion-mnist": "55,000 / 5,000 / 10,000 pieces of clothing of 28x28, from --data-dir",
    "mnist-mini": "5,500 / 500 / 2,000 of them, shipped in experiments/mnist_mini",
    "cifar10": "45,000 / 5,000 / 10,000 colour images of 32x32, from --data-dir",
}
