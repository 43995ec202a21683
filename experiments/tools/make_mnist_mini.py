"""Choose the images of mnist-mini from the four full MNIST files and write them as gzip IDX.

    python -m experiments.tools.make_mnist_mini FOLDER   (which holds train-images-idx3-ubyte, ...)

Of each class, 600 training and 200 test images: those at equal steps through the class in the
order of the file, so that easy and hard parts of the set are both there. No randomness.
"""

import argparse
import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np

from experiments.train import data, image_files

PER_CLASS = {"train": 600, "test": 200}


def choose(labels: np.ndarray, per_class: int) -> np.ndarray:
    """Indices, ascending: of each class the images number floor(i * size / per_class)."""
    chosen = []
    for digit in range(data.CLASSES):
        members = np.flatnonzero(labels == digit)
        chosen.append(members[np.arange(per_class) * len(members) // per_class])
    return np.sort(np.concatenate(chosen))


def idx_bytes(array: np.ndarray) -> bytes:
    """An array of unsigned bytes as an IDX file."""
    return struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()


def main() -> None:
    parser = argparse.ArgumentParser(description="Choose the images of mnist-mini.")
    parser.add_argument("folder", type=Path, help="holds the four full files, plain or .gz")
    parser.add_argument("--out", type=Path, default=data.HERE / "mnist_mini")
    arguments = parser.parse_args()

    def read(part: str) -> np.ndarray:
        file = image_files.MNIST[part]
        path = arguments.folder / file.name
        if not path.is_file():
            path = path.with_name(f"{file.name}.gz")
        return image_files.parse_idx(image_files.read_limited(path, file.size), file, path)

    arguments.out.mkdir(parents=True, exist_ok=True)
    for split, per_class in PER_CLASS.items():
        chosen = choose(read(f"{split} labels"), per_class)
        for kind in ("images", "labels"):
            content = idx_bytes(read(f"{split} {kind}")[chosen])
            name = image_files.MNIST[f"{split} {kind}"].name
            # mtime 0 and no file name: the same bytes on every run
            (arguments.out / f"{name}.gz").write_bytes(gzip.compress(content, 9, mtime=0))
            print(f"{name}  {len(chosen)} {kind}  sha256 {hashlib.sha256(content).hexdigest()}")


if __name__ == "__main__":
    main()
