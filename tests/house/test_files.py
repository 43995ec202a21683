"""Whole files: what a reader, a crash and a folder of several people see."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import lottery_sparse as ls
from lottery_sparse.files import read_tensors, write_whole
from lottery_sparse.text import shown

posix = pytest.mark.skipif(os.name != "posix", reason="modes and folders as POSIX has them")


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def save_ticket(path):
    model = ls.sparsify_(nn.Sequential(nn.Linear(3, 2)))
    ls.Ticket(ls.masks_of(model), {"0.weight": torch.zeros(2, 3)}).save(path)


def write_words(path):
    write_whole(path, b"words")


WRITERS = pytest.mark.parametrize("write", [write_words, save_ticket])


@posix
@WRITERS
@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_a_new_file_has_the_mode_of_the_umask(write, umask, tmp_path):
    before = os.umask(umask)
    try:
        write(tmp_path / "new")
    finally:
        os.umask(before)
    assert mode(tmp_path / "new") == 0o666 & ~umask


@posix
@WRITERS
@pytest.mark.parametrize("kept", [0o600, 0o664, 0o444])
def test_a_file_that_is_replaced_keeps_its_mode(write, kept, tmp_path):
    path = tmp_path / "old"
    path.write_bytes(b"before")
    path.chmod(kept)
    write(path)
    assert path.read_bytes() != b"before"
    assert mode(path) == kept


@posix
def test_a_private_file_is_private_before_it_has_words(tmp_path, monkeypatch):
    path = tmp_path / "old"
    path.write_bytes(b"before")
    path.chmod(0o600)
    seen, sync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (seen.append(os.fstat(fd).st_mode), sync(fd)))
    write_whole(path, b"after")
    assert stat.S_IMODE(seen[0]) == 0o600


@posix
def test_the_file_is_on_the_disk_before_its_name_and_its_folder_after(tmp_path, monkeypatch):
    calls, sync, replace = [], os.fsync, os.replace

    def fsync(fd):
        calls.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
        sync(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", lambda *args: (calls.append("name"), replace(*args)))
    write_whole(tmp_path / "new", b"words")
    assert calls == ["file", "name", "folder"]


@posix
@pytest.mark.parametrize(("number", "is_told"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_system_that_syncs_no_folders_is_no_error_but_a_broken_disk_is(
    number, is_told, tmp_path, monkeypatch
):
    sync = os.fsync

    def fsync(fd):
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(number, os.strerror(number))
        sync(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    if is_told:
        with pytest.raises(OSError, match=os.strerror(number)):
            write_whole(tmp_path / "new", b"words")
    else:
        write_whole(tmp_path / "new", b"words")
    assert (tmp_path / "new").read_bytes() == b"words"


def test_a_failed_write_leaves_what_was_there_and_nothing_beside_it(tmp_path, monkeypatch):
    path = tmp_path / "old"
    path.write_bytes(b"before")

    def full(*_):
        raise OSError(errno.ENOSPC, "no space")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(OSError, match="no space"):
                write_whole(path, b"after")
        assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("old", b"before")]


@posix
def test_the_experiments_write_alike(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; os.umask(0o027);"
        "from experiments.files import write_whole; write_whole(Path(sys.argv[1]), b'words')"
    )
    path = tmp_path / "folder" / "new"
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
    assert mode(path) == 0o640


# ---- links, devices, pipes -----------------------------------------------------------------------


@posix
@WRITERS
@pytest.mark.parametrize("there", [True, False], ids=["a file", "nothing yet"])
def test_a_link_stays_and_its_target_is_written(write, there, tmp_path):
    (tmp_path / "runs").mkdir()
    target = tmp_path / "runs" / "run-7"
    if there:
        target.write_bytes(b"before")
        target.chmod(0o640)
    links = [tmp_path / "latest", tmp_path / "runs" / "newest"]
    links[1].symlink_to("run-7")
    links[0].symlink_to("runs/newest")  # a chain of relative ones
    write(links[0])
    assert [os.readlink(link) for link in links] == ["runs/newest", "run-7"]
    assert target.read_bytes() not in (b"before", b"")
    assert sorted(p.name for p in target.parent.iterdir()) == ["newest", "run-7"]
    if there:
        assert mode(target) == 0o640


@posix
def test_a_link_to_itself_is_the_systems_error(tmp_path):
    link = tmp_path / "link"
    link.symlink_to("link")
    with pytest.raises(OSError) as caught:
        write_whole(link, b"words")
    assert caught.value.errno == errno.ELOOP
    assert os.listdir(tmp_path) == ["link"]


@posix
@WRITERS
def test_a_pipe_is_written_to_and_stays_a_pipe(write, tmp_path):
    path, got = tmp_path / "pipe", []
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: got.append(path.read_bytes()))
    reader.start()
    write(path)
    reader.join()
    assert stat.S_ISFIFO(path.stat().st_mode)
    assert got[0]
    assert os.listdir(tmp_path) == ["pipe"]


@posix
def test_a_device_is_written_to_and_stays_a_device(tmp_path):
    path = tmp_path / "null"
    try:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        path.write_bytes(b"")
    except OSError:
        pytest.skip("this user makes no devices")
    write_whole(path, b"words")
    assert stat.S_ISCHR(path.stat().st_mode)
    (tmp_path / "link").symlink_to("null")
    write_whole(tmp_path / "link", b"words")
    assert sorted(os.listdir(tmp_path)) == ["link", "null"]


@posix
@pytest.mark.skipif(not Path("/dev/stdout").exists(), reason="there is no /dev/stdout")
@pytest.mark.parametrize("into", ["file", "pipe"])
def test_standard_output_is_written_to_wherever_it_goes(into, tmp_path):
    code = (
        "import sys; from pathlib import Path; from lottery_sparse.files import write_whole;"
        "print('before', flush=True); write_whole(Path('/dev/stdout'), b'words\\n');"
        "print('after')"
    )
    path = tmp_path / "out"
    with open(path, "wb") as out:
        inode = os.fstat(out.fileno()).st_ino
        to = out if into == "file" else subprocess.PIPE
        done = subprocess.run([sys.executable, "-c", code], check=True, stdout=to)
    assert (path.read_bytes() if into == "file" else done.stdout) == b"before\nwords\nafter\n"
    assert path.stat().st_ino == inode


@WRITERS
def test_a_folder_is_named(write, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(IsADirectoryError, match=rf"this is a folder, but .*{folder}"):
        write(folder)
    assert os.listdir(tmp_path) == ["folder"]


@posix
@WRITERS
def test_names_up_to_the_limit_of_the_file_system(write, tmp_path):
    path = tmp_path / ("ü" * (os.pathconf(tmp_path, "PC_NAME_MAX") // 2))
    write(path)
    assert os.listdir(tmp_path) == [path.name]


# ---- tensors -------------------------------------------------------------------------------------


def test_tensors_own_their_bytes(tmp_path):
    path = tmp_path / "t.safetensors"
    held = {"w": torch.arange(5.0), "none": torch.zeros(0, 3), "h": torch.ones(2).bfloat16()}
    safetensors.torch.save_file(held, path, {"said": "before"})
    tensors, metadata = read_tensors(path)
    with open(path, "r+b") as file:  # in place, as rsync --inplace and network drives write
        file.write(b"\xff" * path.stat().st_size)
    os.truncate(path, 0)
    assert metadata == {"said": "before"}
    assert tensors.keys() == held.keys()
    for name, value in held.items():
        assert tensors[name].dtype == value.dtype
        assert torch.equal(tensors[name], value)
    tensors["w"].add_(1)
    assert not Path("/proc/self/maps").exists() or str(path) not in Path(
        "/proc/self/maps"
    ).read_text("utf-8")


def test_tensors_come_in_the_order_of_their_names(tmp_path):
    held = {f"{i * 7919 % 64:02}": torch.ones(i % 3) for i in range(64)}
    safetensors.torch.save_file(held, tmp_path / "t.safetensors")
    assert list(read_tensors(tmp_path / "t.safetensors")[0]) == sorted(held)


def header(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        header(b"{}")[:-1],
        header(b"[1]"),
        header(b"[" * 100_000),
        header(b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}') + b"1234567",
        header(b'{"w": {"dtype": "F9", "shape": [1], "data_offsets": [0, 1]}}') + b"1",
        header(b'{"w": {"dtype": "F8_E8M0", "shape": [1], "data_offsets": [0, 1]}}') + b"1",
        header(b'{"\x1b[31m": 1}'),
    ],
    ids=range(9),
)
def test_a_file_that_is_no_safetensors_is_a_value_error_of_one_printable_line(content, tmp_path):
    path = tmp_path / "t.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_tensors(path)
    assert type(caught.value) is ValueError
    assert str(caught.value).isprintable()


# ---- text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("0.weight", "0.weight"),
        ("größe · 重み", "größe · 重み"),
        ("a\x1b[31mb\nc\u202e", "a\\x1b[31mb\\nc\\u202e"),
        (["a\n"], "['a\\n']"),
        (1.5, "1.5"),
        ("x" * 1234, "x" * 200 + "… (1,034 more characters)"),
        ("\n" * 1234, "\\n" * 200 + "… (1,034 more characters)"),
    ],
)
def test_text_of_a_file_is_one_printable_line(value, text):
    assert shown(value) == text
    assert shown(value).isprintable()
