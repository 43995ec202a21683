"""The kernels take no more instructions than results/instructions.json allows. Where valgrind or
the compiler of those counts is missing, this says so and is skipped."""

from __future__ import annotations

import copy
import json

import pytest

from benchmarks.compile import instructions


@pytest.fixture(scope="module")
def now():
    if reason := instructions.why_not():
        pytest.skip(f"instructions are not counted: {reason}")
    return instructions.count()


@pytest.fixture
def stored():
    return json.loads(instructions.STORED.read_text())


def test_every_stored_kernel_is_counted(now, stored):
    for variant, kernels in now["counts"].items():
        assert kernels.keys() == stored["counts"][variant].keys()
        assert all(value > 0 for value in kernels.values())


def test_no_kernel_takes_more_instructions(now, stored):
    if not instructions.comparable(now, stored):
        pytest.skip(f"counts are of {stored['compiler']}, this compiler is {now['compiler']}")
    assert instructions.grown(now, stored) == []


def test_four_percent_more_is_found(stored):
    worse = copy.deepcopy(stored)
    worse["counts"]["portable"]["sparse_linear.multiply 10%"] *= 1.04
    (sentence,) = instructions.grown(worse, stored)
    assert "sparse_linear.multiply 10% (portable)" in sentence
    assert "+4.0%" in sentence
