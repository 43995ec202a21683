"""One CPU thread unless a benchmark says otherwise, fixed seeds, and a look at the load first."""

from __future__ import annotations

import os

import pytest
import torch

IDLE = 0.3  # processes running on average, ours not counted


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="few layers and rounds")


def pytest_report_header() -> str | None:
    load = os.getloadavg()[0]
    if load <= IDLE:
        return None
    return (
        f"WARNING: this machine is not idle (load {load:.1f}); ratios of minima still mean "
        "something, single times do not."
    )


@pytest.fixture
def quick(request) -> bool:
    return request.config.getoption("--quick")


@pytest.fixture(autouse=True)
def _one_thread_and_fixed_seeds():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def pytest_generate_tests(metafunc):
    """Parameters that depend on --quick: a module's function `cases(quick)` lists them."""
    if "case" in metafunc.fixturenames:
        cases = metafunc.module.cases(metafunc.config.getoption("--quick"))
        metafunc.parametrize("case", cases, ids=lambda case: " ".join(map(str, case)))
