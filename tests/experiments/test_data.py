"""Data files: what is read, what is refused and with which words, and the order of batches."""

import gzip
import hashlib
import io
import tarfile
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

from experiments.tools.make_mnist_mini import choose, idx_bytes
from experiments.train import data, download, image_files


def idx_file(array: np.ndarray, name: str = "digits") -> tuple[image_files.IdxFile, bytes]:
    content = idx_bytes(array)
    return image_files.IdxFile(name, array.shape, hashlib.sha256(content).hexdigest()), content


IMAGES = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)


# mnist-mini: real digits, in the repository


def test_mnist_mini_is_a_balanced_set_of_real_digits():
    mini = data.load("mnist-mini")
    assert [len(part) for part in (mini.train, mini.val, mini.test)] == [5_500, 500, 2_000]
    assert mini.train.images.shape == (5_500, 1, 28, 28)
    for part in (mini.train, mini.val, mini.test):
        assert part.images.dtype == torch.float32
        assert part.labels.dtype == torch.int64
        assert part.images.min() == 0
        assert part.images.max() == 1  # divided by 255, nothing else
    labels = torch.cat([mini.train.labels, mini.val.labels])
    assert labels.bincount().tolist() == [600] * 10
    assert mini.test.labels.bincount().tolist() == [200] * 10
    # a one is thinner than a zero: the labels belong to the images
    ink = [mini.test.images[mini.test.labels == digit].mean().item() for digit in (0, 1)]
    assert ink[0] > 2 * ink[1]


def test_mnist_mini_is_small():
    size = sum(file.stat().st_size for file in (data.HERE / "mnist_mini").iterdir())
    assert size < 2 * 2**20


def test_choice_takes_equal_steps_through_each_class():
    labels = np.tile(np.arange(10, dtype=np.uint8), 8)
    chosen = choose(labels, per_class=4)
    assert (np.bincount(labels[chosen]) == 4).all()
    assert chosen.tolist() == [10 * step + digit for step in (0, 2, 4, 6) for digit in range(10)]


def test_validation_part_is_drawn_once_by_numpy_seed_0():
    mini = data.load("mnist-mini")
    folder = data.HERE / "mnist_mini"
    file = image_files.MNIST_MINI["train labels"]
    labels = image_files.parse_idx(
        image_files.read_limited(folder / f"{file.name}.gz", file.size), file, folder
    )
    held_out = np.random.RandomState(0).choice(6_000, 500, replace=False)
    assert mini.val.labels.tolist() == labels[np.sort(held_out)].tolist()
    assert mini.train.labels.tolist() == np.delete(labels, held_out).tolist()


# files that are not what they should be


@pytest.mark.parametrize("length", [0, 1, 3, 4, 8, 15, 16, 17, 39])
def test_truncated_idx_is_refused_with_both_sizes(length, tmp_path):
    file, content = idx_file(IMAGES)
    path = tmp_path / file.name
    path.write_bytes(content[:length])
    with pytest.raises(
        image_files.DataError, match=f"digits holds {length} bytes, expected 40.*Delete"
    ):
        image_files.parse_idx(image_files.read_limited(path, file.size), file, path)


def test_every_flipped_byte_is_found(tmp_path):
    file, content = idx_file(IMAGES)
    path = tmp_path / file.name
    assert (image_files.parse_idx(content, file, path) == IMAGES).all()
    for place in range(len(content)):
        bad = bytearray(content)
        bad[place] ^= 1
        with pytest.raises(image_files.DataError, match=r"magic number|dimensions|SHA-256"):
            image_files.parse_idx(bytes(bad), file, path)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(24, np.uint8), "starts with magic number 0x00000801, expected 0x00000803"),
        (np.zeros((2, 4, 3), np.uint8), r"dimensions are \(2, 4, 3\), expected \(2, 3, 4\)"),
        (np.zeros((2, 3, 4), np.uint8), f"has SHA-256 [0-9a-f]{{64}}, expected {'0' * 64}"),
    ],
    ids=["magic", "dimensions", "checksum"],
)
def test_wrong_idx_says_found_and_expected(array, message, tmp_path):
    file = image_files.IdxFile("digits", (2, 3, 4), "0" * 64)
    with pytest.raises(image_files.DataError, match=message):
        image_files.parse_idx(idx_bytes(array), file, tmp_path / "digits")


def test_longer_file_is_refused_and_not_read_to_its_end(tmp_path):
    file, content = idx_file(IMAGES)
    path = tmp_path / "digits.gz"
    path.write_bytes(gzip.compress(content + bytes(10**7)))  # 10 MB that compress to 10 kB
    assert len(image_files.read_limited(path, file.size)) == file.size + 1
    with pytest.raises(image_files.DataError, match="holds 41 bytes, expected 40"):
        image_files.parse_idx(image_files.read_limited(path, file.size), file, path)


def test_gzip_truncated_anywhere_is_refused(tmp_path):
    file, content = idx_file(IMAGES)
    whole = gzip.compress(content)
    path = tmp_path / "digits.gz"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(image_files.DataError, match=r"digits\.gz .*expected 40"):
            image_files.parse_idx(image_files.read_limited(path, file.size), file, path)


def test_gzip_with_a_wrong_checksum_is_refused(tmp_path):
    file, content = idx_file(IMAGES)
    whole = bytearray(gzip.compress(content))
    whole[-8] ^= 1  # of the CRC
    path = tmp_path / "digits.gz"
    path.write_bytes(whole)
    with pytest.raises(image_files.DataError, match="not a whole gzip file"):
        image_files.read_limited(path, file.size)


def test_not_found_names_the_folder_and_every_file_tried(tmp_path):
    with pytest.raises(image_files.DataError, match="--data-dir") as error:
        data.load("mnist", tmp_path)
    assert f"{tmp_path / 'MNIST' / 'raw'} has no " in str(error.value)
    for file in image_files.MNIST.values():
        assert f"{file.name}[.gz]" in str(error.value)
    with pytest.raises(
        image_files.DataError, match=r"cifar-10-batches-bin has no .*data_batch_3\.bin"
    ):
        data.load("cifar10", tmp_path)


def test_without_a_folder_the_way_out_is_named(monkeypatch):
    monkeypatch.delenv("LS_DATA_DIR", raising=False)
    with pytest.raises(image_files.DataError, match="--data-dir DIR or set LS_DATA_DIR"):
        data.load("mnist")
    with pytest.raises(
        image_files.DataError,
        match="one of mnist, fashion-mnist, mnist-mini, cifar10, or MODULE:ATTR; got 'svhn'",
    ):
        data.load("svhn")


# the layout of torchvision, with small files in place of the full ones


@pytest.fixture
def small_mnist(monkeypatch):
    """image_files.MNIST with 24 training and 6 test images; their content by file name."""
    contents = {}
    for part, file in image_files.MNIST.items():
        count = 24 if part.startswith("train") else 6
        array = np.arange(count * (784 if "images" in part else 1), dtype=np.uint64) % 10
        array = array.astype(np.uint8).reshape(count, *file.shape[1:])
        small, contents[file.name] = idx_file(array, file.name)
        monkeypatch.setitem(image_files.MNIST, part, small)
    return contents


@pytest.fixture
def small_cifar10(monkeypatch):
    """CIFAR-10 with 12 records a file; its content by file name."""
    monkeypatch.setattr(image_files, "CIFAR10_RECORDS", 12)
    contents = {}
    for i, name in enumerate((*image_files.CIFAR10_TRAIN, image_files.CIFAR10_TEST)):
        records = np.full((12, 3073), i, np.uint8)
        records[:, 0] = np.arange(12) % 10
        records[:, 1025:2049] = 100 + i  # the green plane
        contents[name] = records.tobytes()
    return contents


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_mnist_is_found_plain_or_packed(packed, small_mnist, tmp_path, monkeypatch):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, content in small_mnist.items():
        if packed:
            (raw / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (raw / name).write_bytes(content)
    monkeypatch.setenv("LS_DATA_DIR", str(tmp_path))
    assert data.has_mnist(None)
    mnist = data.load("mnist")
    assert (len(mnist.train), len(mnist.val), len(mnist.test)) == (22, 2, 6)
    assert mnist.test.images[0, 0, 0, :3].tolist() == pytest.approx([0, 1 / 255, 2 / 255])


@pytest.fixture
def small_fashion(small_mnist, monkeypatch):
    """image_files.FASHION_MNIST as small as MNIST, other images in files of the same names."""
    contents = {}
    for part, file in image_files.MNIST.items():
        monkeypatch.setitem(image_files.FASHION_MNIST, part, replace(file, sha256=""))
        content = bytearray(small_mnist[file.name])
        content[-1] ^= 1
        contents[file.name] = bytes(content)
    return contents


def put(folder, contents):
    folder.mkdir(parents=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)


def test_fashion_mnist_lies_beside_mnist(small_fashion, tmp_path):
    put(tmp_path / "FashionMNIST" / "raw", small_fashion)
    fashion = data.load("fashion-mnist", tmp_path)
    assert (len(fashion.train), len(fashion.val), len(fashion.test)) == (22, 2, 6)
    assert fashion.test.images.shape == (6, 1, 28, 28)
    with pytest.raises(image_files.DataError, match=r"MNIST/raw has no .*, or add --download"):
        data.load("mnist", tmp_path)


def test_files_of_mnist_are_not_fashion_mnist(small_mnist, small_fashion, tmp_path):
    put(tmp_path / "FashionMNIST" / "raw", small_mnist)
    with pytest.raises(image_files.DataError, match="is the file of MNIST, expected another set"):
        data.load("fashion-mnist", tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-1], "holds 13 bytes, expected 14"),
        (lambda content: content[:-1] + b"\x0a", "holds the label 10, expected labels 0 to 9"),
    ],
)
def test_fashion_mnist_that_is_not_whole_is_refused(change, message, small_fashion, tmp_path):
    name = "t10k-labels-idx1-ubyte"
    put(tmp_path / "FashionMNIST" / "raw", small_fashion | {name: change(small_fashion[name])})
    with pytest.raises(image_files.DataError, match=message):
        data.load("fashion-mnist", tmp_path)


def test_fashion_mnist_is_not_downloaded(tmp_path):
    with pytest.raises(image_files.DataError, match="put its four files into DIR/FashionMNIST/raw"):
        data.load("fashion-mnist", tmp_path, download=True)
    with pytest.raises(image_files.DataError, match=r"has no train-\S+\[.gz\].* LS_DATA_DIR\.$"):
        data.load("fashion-mnist", tmp_path)


def test_cifar10_is_read_in_planes(small_cifar10, tmp_path):
    folder = tmp_path / image_files.CIFAR10_FOLDER
    folder.mkdir()
    for name, content in small_cifar10.items():
        (folder / name).write_bytes(content)
    cifar = data.load("cifar10", tmp_path)
    assert (len(cifar.train), len(cifar.val), len(cifar.test)) == (55, 5, 12)
    assert cifar.test.images.shape == (12, 3, 32, 32)
    assert cifar.test.labels.tolist() == [i % 10 for i in range(12)]
    assert (cifar.test.images[:, 0] * 255).unique().tolist() == [5]
    assert (cifar.test.images[:, 1] * 255).round().unique().tolist() == [105]


@pytest.mark.parametrize("length", [0, 1, 3072, 3073, 12 * 3073 - 1, 12 * 3073 + 1])
def test_cifar10_of_a_wrong_length_is_refused(length, small_cifar10, tmp_path):
    content = (small_cifar10["test_batch.bin"] + b"\0")[:length]
    with pytest.raises(image_files.DataError, match=f"holds {length} bytes, expected {12 * 3073}"):
        image_files.parse_cifar10(content, tmp_path / "test_batch.bin")


def test_cifar10_with_a_label_out_of_range_is_refused(small_cifar10, tmp_path):
    content = b"\x0a" + small_cifar10["test_batch.bin"][1:]
    with pytest.raises(image_files.DataError, match="holds the label 10, expected labels 0 to 9"):
        image_files.parse_cifar10(content, tmp_path / "test_batch.bin")


# download, with the network replaced


class Response(io.BytesIO):
    def __init__(self, content: bytes, address: str):
        super().__init__(content)
        self.geturl = lambda: address


@pytest.fixture
def internet(monkeypatch):
    """url -> content that urlopen serves; `final` rewrites the address it was redirected to."""
    pages: dict[str, bytes] = {}
    final: dict[str, str] = {}

    @contextmanager
    def urlopen(url, timeout):
        yield Response(pages[url], final.get(url, url))

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    return pages, final


def test_download_fetches_only_what_is_missing(small_mnist, internet, tmp_path):
    pages, _ = internet
    for name, content in small_mnist.items():
        pages[f"{download.MNIST_URL}{name}.gz"] = gzip.compress(content)
    raw = tmp_path / "MNIST" / "raw"
    mnist = data.load("mnist", tmp_path, download=True)
    assert len(mnist.train) == 22
    assert sorted(path.name for path in raw.iterdir()) == sorted(small_mnist)  # nothing else left
    pages.clear()
    data.load("mnist", tmp_path, download=True)  # needs no page any more


@pytest.mark.parametrize(
    ("page", "message"),
    [
        (gzip.compress(b"no digits"), "holds 9 bytes, expected"),
        (b"<html>not found</html>", "not a whole gzip file"),
        (bytes(2**24 + 1), "sends more than the 16777216 bytes"),
    ],
    ids=["content", "html", "size"],
)
def test_download_keeps_nothing_that_is_wrong(page, message, small_mnist, internet, tmp_path):
    pages, _ = internet
    for name in small_mnist:
        pages[f"{download.MNIST_URL}{name}.gz"] = page
    with pytest.raises(image_files.DataError, match=message):
        data.load("mnist", tmp_path, download=True)
    assert not list((tmp_path / "MNIST" / "raw").iterdir())


def test_download_refuses_a_redirect_away_from_https(small_mnist, internet, tmp_path):
    pages, final = internet
    url = f"{download.MNIST_URL}train-images-idx3-ubyte.gz"
    pages[url] = gzip.compress(small_mnist["train-images-idx3-ubyte"])
    final[url] = "http://example.org/mnist"
    with pytest.raises(image_files.DataError, match="not https"):
        data.load("mnist", tmp_path, download=True)


def test_download_of_cifar10_takes_members_by_name(small_cifar10, internet, tmp_path, monkeypatch):
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name, content in {"../evil": b"x", **small_cifar10}.items():
            member = tarfile.TarInfo(f"{image_files.CIFAR10_FOLDER}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    pages, _ = internet
    pages[download.CIFAR10_URL] = archive.getvalue()
    with pytest.raises(image_files.DataError, match=r"SHA-256 .* nothing was kept"):
        data.load("cifar10", tmp_path, download=True)
    assert not list((tmp_path / image_files.CIFAR10_FOLDER).iterdir())
    digest = hashlib.sha256(archive.getvalue()).hexdigest()
    monkeypatch.setattr(download, "CIFAR10_SHA256", digest)
    assert len(data.load("cifar10", tmp_path, download=True).train) == 55
    assert not (tmp_path / "evil").exists()


# batches


def test_batches_are_a_function_of_seed_and_epoch():
    first = data.batches(1_000, 60, seed=3, epoch=5)
    assert first.shape == (16, 60)  # the 40 left over are dropped
    assert len(first.unique()) == 960
    torch.manual_seed(123)  # no global state takes part
    assert torch.equal(first, data.batches(1_000, 60, seed=3, epoch=5))
    assert not torch.equal(first, data.batches(1_000, 60, seed=3, epoch=6))
    assert not torch.equal(first, data.batches(1_000, 60, seed=4, epoch=5))


def test_every_image_is_used_in_some_epoch():
    used = torch.cat([data.batches(100, 60, seed=0, epoch=epoch).flatten() for epoch in range(20)])
    assert len(used.unique()) == 100


@pytest.mark.parametrize("batch_size", [0, -1, 101])
def test_batch_size_out_of_range_is_refused(batch_size):
    with pytest.raises(ValueError, match=f"between 1 and the 100 images, got {batch_size}"):
        data.batches(100, batch_size, seed=0, epoch=0)
