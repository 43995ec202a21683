"""Temporary files of whole writes: those of killed savers go, those of savers at work stay."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import time

import pytest

from lottery_sparse import files
from lottery_sparse.files import temporary, write_whole

pytestmark = pytest.mark.skipif(os.name != "posix", reason="locks and forks as POSIX has them")

FORKS = """
import os, signal, sys
from pathlib import Path
from lottery_sparse.files import write_whole

path = Path(sys.argv[1])

def killed_in(call):
    setattr(os, call, lambda *args: os.kill(os.getpid(), signal.SIGKILL))
    write_whole(path, b"half")

def save_often(word):
    for _ in range(60):
        write_whole(path, word * 100_000)

children = []
for work, argument in eval(sys.argv[2]):
    children.append(os.fork())
    if children[-1] == 0:
        work(argument)
        os._exit(0)
print([os.waitpid(child, 0)[1] for child in children])
"""


def forks(path, work):
    """A process without threads, whose children save `path`; the status each ends with comes."""
    command = [sys.executable, "-c", FORKS, str(path), work]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_what_killed_saves_left_goes_with_the_next_one(tmp_path):
    path = tmp_path / "[a]*"  # a name that a pattern would read otherwise
    others = [
        temporary(tmp_path / "other") + "0" * 16,
        temporary(path) + "mine",
        f".{path.name}.{'0' * 16}",
    ]
    for name in others:
        (tmp_path / name).write_bytes(b"of somebody else")
    (tmp_path / (temporary(path) + "1" * 16)).symlink_to(others[0])
    (tmp_path / (temporary(path) + "2" * 16)).mkdir()
    before = sorted(os.listdir(tmp_path))
    said, _ = forks(path, "[(killed_in, 'fsync'), (killed_in, 'replace')]").communicate()
    assert said.split() == ["[9,", "9]"]
    assert len(os.listdir(tmp_path)) > len(before)
    write_whole(path, b"words")
    assert sorted(os.listdir(tmp_path)) == sorted([*before, path.name])
    assert path.read_bytes() == b"words"


def test_a_leftover_that_may_not_be_written_goes_too(tmp_path):
    path = tmp_path / "t"
    left = tmp_path / (temporary(path) + "0" * 16)
    left.write_bytes(b"half")
    left.chmod(0o444)
    write_whole(path, b"words")
    assert os.listdir(tmp_path) == ["t"]


def test_a_saver_at_work_is_left_alone(tmp_path, monkeypatch):
    """Another one saves the same name while this one is between its words and its name."""
    path, replace = tmp_path / "t", os.replace

    def other_first(*args):
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            write_whole(path, b"other")
        assert path.read_bytes() == b"other"
        replace(*args)

    monkeypatch.setattr(os, "replace", other_first)
    write_whole(path, b"mine")
    assert path.read_bytes() == b"mine"
    assert os.listdir(tmp_path) == ["t"]


def test_a_temporary_file_that_is_taken_for_a_leftover_is_made_again(tmp_path, monkeypatch):
    """A sweep of another process comes between its making and its lock."""
    path, flock, swept = tmp_path / "t", fcntl.flock, []

    def sweep_first(fd, operation):
        if not swept:
            swept.append(fd)
            files._sweep(path)
            assert os.listdir(tmp_path) == []
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", sweep_first)
    write_whole(path, b"words")
    assert swept
    assert path.read_bytes() == b"words"


def test_where_nothing_can_be_locked_nothing_is_taken_for_a_leftover(tmp_path, monkeypatch):
    def no_locks(fd, operation):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    path = tmp_path / "t"
    left = tmp_path / (temporary(path) + "0" * 16)
    left.write_bytes(b"of a writer that may be at work")
    write_whole(path, b"words")
    assert sorted(os.listdir(tmp_path)) == sorted(["t", left.name])


def test_two_savers_of_one_name_never_fail_and_readers_see_whole_files(tmp_path):
    path = tmp_path / "t"
    write_whole(path, b"a" * 100_000)
    savers = forks(path, "[(save_often, b'a'), (save_often, b'b')]")
    while savers.poll() is None:
        content = path.read_bytes()
        assert content in (b"a" * 100_000, b"b" * 100_000)
        time.sleep(0.001)
    assert savers.communicate()[0].split() == ["[0,", "0]"]
    assert os.listdir(tmp_path) == ["t"]
