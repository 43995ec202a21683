"""What every test gets: fixed seeds, one thread, poisoned uninitialised memory, no network.

LS_TEST_THREADS=2 gives two threads of torch's instead, for `make test-everywhere`.
"""

from __future__ import annotations

import os
import random
import socket
import sys

import hypothesis
import pytest
import torch

# Limits of dispatch as the code has them, whatever was measured on this machine.
os.environ["LS_MACHINE"] = "0"

from lottery_sparse.tools import doctor

# What cuBLAS asks for in torch's deterministic mode, which `_poisoned_memory` turns on.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# The same examples every time: a failure seen once is seen by everyone.
hypothesis.settings.register_profile("tests", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("tests")


def pytest_report_header() -> str:
    return doctor.native_line()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that no worker is left alone with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def _fixed_seeds():
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _one_thread():
    # two threads on a busy two-core machine vary by a factor of a hundred
    torch.set_num_threads(int(os.environ.get("LS_TEST_THREADS", "1")))


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """New memory holds NaN (integers: their largest value) until something is written, in C++ too.

    A kernel that forgets one element then fails. torch offers it as a part of its deterministic
    mode, which is what we want in tests anyway.
    """
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _nothing_compiled():
    """torch.compile gives up for good on code that other tests made it compile too often."""
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """Connecting anywhere but to this machine fails the test."""
    connect = socket.socket.connect

    def local_only(self, address):
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise RuntimeError(f"tests use no network, but something connects to {address[0]}.")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)


@pytest.fixture(scope="module")
def any_arithmetic():
    """Studies run whatever kernels there are: what they compute is compared with itself alone."""
    from experiments.store import arithmetic

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arithmetic, "check", lambda run, device: None)
        yield
