"""CIFAR-10 as torchvision leaves it: arrays out of pickles, and nothing that they ask to be run."""

import pickle
import struct

import numpy as np
import pytest

from experiments.train import data, image_files, pickled


def of_python_2(images: np.ndarray, labels: list[int]) -> bytes:
    """A batch as Python 2 and the NumPy of its time wrote it: the files that are there."""
    shape = b"".join(b"M" + struct.pack("<H", n) for n in images.shape)
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
        b"(K\x01(" + shape + b"tcnumpy\ndtype\n(U\x02u1K\x00K\x01tR"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        b"T" + struct.pack("<i", images.size) + images.tobytes() + b"tb"
    )
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(U\x04data" + array + b"U\x06labels" + numbers + b"u."


@pytest.fixture
def batches(monkeypatch):
    """Six files of 12 images each, by name."""
    monkeypatch.setattr(image_files, "CIFAR10_RECORDS", 12)
    found = {}
    for i, name in enumerate((*image_files.CIFAR10_TRAIN, image_files.CIFAR10_TEST)):
        images = np.full((12, 3072), i, np.uint8)
        images[:, 1024:2048] = 100 + i  # the green plane
        found[name.removesuffix(".bin")] = of_python_2(images, [n % 10 for n in range(12)])
    return found


def put(folder, batches):
    folder.mkdir(parents=True)
    for name, content in batches.items():
        (folder / name).write_bytes(content)


def test_what_torchvision_leaves_is_read(batches, tmp_path):
    put(tmp_path / "cifar-10-batches-py", batches)
    cifar = data.load("cifar10", tmp_path)
    assert (len(cifar.train), len(cifar.val), len(cifar.test)) == (55, 5, 12)
    assert cifar.test.labels.tolist() == [i % 10 for i in range(12)]
    assert (cifar.test.images[:, 0] * 255).unique().tolist() == [5]
    assert (cifar.test.images[:, 1] * 255).round().unique().tolist() == [105]
    assert cifar.source == tmp_path / "cifar-10-batches-py"


def test_the_binary_version_is_the_same_set(batches, tmp_path):
    put(tmp_path / "a" / "cifar-10-batches-py", batches)
    binary = {}
    for name, content in batches.items():
        found = pickled.arrays_of(content)
        labels = np.array(found[b"labels"], np.uint8)[:, None]
        binary[f"{name}.bin"] = np.hstack([labels, found[b"data"]]).tobytes()
    put(tmp_path / "b" / "cifar-10-batches-bin", binary)
    one, other = (data.load("cifar10", tmp_path / at) for at in "ab")
    for part in ("train", "val", "test"):
        assert getattr(one, part).images.equal(getattr(other, part).images)
        assert getattr(one, part).labels.equal(getattr(other, part).labels)


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_arrays_of_todays_numpy_are_read(protocol):
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    if protocol < 5:  # 5 hands arrays to a function of NumPy's that is not known here
        found = pickled.arrays_of(pickle.dumps({b"data": array}, protocol))
        assert (found[b"data"] == array).all()
    else:
        with pytest.raises(ValueError, match=r"it asks for numpy\S+, which is not run"):
            pickled.arrays_of(pickle.dumps({b"data": array}, protocol))


class Asks:
    def __reduce__(self):
        return print, ("run by a pickle",)


@pytest.mark.parametrize("protocol", [0, 2, 3, 5])
def test_nothing_that_a_file_names_is_run(protocol, capsys):
    for inner in (Asks(), {"data": [Asks()]}):
        with pytest.raises(ValueError, match=r"it asks for \S+print, which is not run"):
            pickled.arrays_of(pickle.dumps(inner, protocol))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "content",
    [
        b"cos\nsystem\n(S'echo run'\ntR.",
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\ndtype\n(K\x00tU\x01btR.",
        b"cnumpy\ndtype\n(U\x02O8K\x00K\x01tR.",
        b"cnumpy\nndarray\n(K\x05tR.",
        b"",
        b"\x80\x02}",
        b"no pickle",
    ],
)
def test_other_pickles_are_one_sentence(content, tmp_path):
    with pytest.raises(image_files.DataError, match=r"is not as expected: it .* Delete it, then"):
        image_files.parse_pickled_cifar10(content, tmp_path / "data_batch_1")


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((11, 3072), np.uint8), [0] * 12, r"no bytes of shape \(12, 3072\) under b'data'"),
        (np.zeros((12, 3072), np.uint8), [0] * 11, "no list of 12 numbers under b'labels'"),
        (np.zeros((12, 3072), np.uint8), [0] * 11 + [10], "the label 10, expected labels 0 to 9"),
    ],
)
def test_batches_of_another_size_are_refused(images, labels, message, batches, tmp_path):
    with pytest.raises(image_files.DataError, match=message):
        image_files.parse_pickled_cifar10(of_python_2(images, labels), tmp_path / "test_batch")


def test_an_array_that_is_shorter_than_it_says_is_refused(batches):
    whole = batches["test_batch"]
    at = whole.index(b"M\x0c\x00M\x00\x0c")
    for broken in (whole[:at] + b"M\x0d\x00M\x00\x0c" + whole[at + 6 :], whole[:5_000]):
        with pytest.raises(ValueError, match=r"^it (holds an array|is no pickle)"):
            pickled.arrays_of(broken)


def test_a_file_cut_anywhere_is_one_sentence(batches):
    whole = of_python_2(np.zeros((2, 4), np.uint8), [1, 2])
    for length in range(len(whole)):
        with pytest.raises(ValueError, match=r"^it "):
            pickled.arrays_of(whole[:length])
