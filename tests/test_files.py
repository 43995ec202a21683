"""Whole files: what a reader, a crash and a folder of several people see."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys

import pytest
import torch
from torch import nn

import lottery_sparse as ls
from lottery_sparse.files import write_whole

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
