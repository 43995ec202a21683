"""Calls beside each other on a loaded machine. Nothing is timed here: the clock is made up."""

import pytest

from experiments.store import arithmetic
from experiments.timing import least


class Machine:
    """A clock that a call moves on by its cost, and by what others add to it at that moment."""

    def __init__(self, loads):
        self.now, self.loads = 0.0, iter(loads)

    def call(self, cost):
        def run():
            self.now += cost + next(self.loads)

        return run

    def least(self, repetitions=5, **costs):
        calls = {name: self.call(cost) for name, cost in costs.items()}
        return least(calls, repetitions, clock=lambda: self.now)


def test_calls_that_prepare_once_do_not_count_for_it():
    found = Machine([230.0, 3.0, *[0.0] * 10]).least(lowered=10.0, whole=18.0)
    assert found == {"lowered": 10.0, "whole": 18.0}


def test_a_load_that_comes_and_goes_changes_nothing():
    """Four of five turns are busy, and busiest while the first of both is measured."""
    loads = [0.0, 0.0, 990.0, 5.0, 700.0, 0.0, 0.0, 80.0, 300.0, 1.0, 640.0, 9.0]
    assert Machine(loads).least(lowered=10.0, whole=18.0) == {"lowered": 10.0, "whole": 18.0}


def test_calls_take_turns():
    order = []
    least({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert order == ["a", "b"] * 4


def test_a_precision_is_timed_beside_float32_in_turns(monkeypatch):
    seen = {}

    def told(calls, repetitions):
        seen.update(calls=list(calls), repetitions=repetitions)
        return {"bfloat16": 1.0, "float32": 2.0}

    monkeypatch.setattr(arithmetic, "least", told)
    assert arithmetic.slowdown("bfloat16") == 0.5
    assert seen["calls"] == ["bfloat16", "float32"]
    assert seen["repetitions"] >= 5


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_the_convolution_of_each_precision_runs(monkeypatch, precision):
    monkeypatch.setattr(arithmetic, "REPETITIONS", 1)
    assert arithmetic.slowdown(precision) > 0
