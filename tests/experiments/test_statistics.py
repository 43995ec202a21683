"""Statistics of the figures: against scipy, published tables, and sums done by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from experiments.findings.statistics import (
    TOO_FEW,
    compare,
    detectable,
    holm,
    interval,
    levels,
    mean,
    paired,
    stars,
    welch,
)

A = (0.981, 0.979, 0.984, 0.980, 0.982)
B = (0.978, 0.975, 0.979, 0.9795, 0.971)


def row(seed, round, value, **fields):
    return {
        "run_id": f"s{seed}",
        "seed": seed,
        "round": round,
        "density": 0.8**round,
        "test_accuracy": value,
        **fields,
    }


def test_the_interval_is_that_of_a_t_table():
    # mean 3, standard deviation sqrt(2.5), t(0.975, 4) = 2.776445
    half = 2.776445 * math.sqrt(2.5 / 5)
    assert interval([1, 2, 3, 4, 5]) == pytest.approx((3 - half, 3 + half), abs=1e-6)
    expected = stats.t.interval(0.9, len(A) - 1, loc=np.mean(A), scale=stats.sem(A))
    assert interval(A, 0.9) == pytest.approx(expected)


def test_one_value_has_no_interval():
    assert interval([0.5]) is None
    assert interval([0.5, 0.5]) == (0.5, 0.5)


def test_welch_by_hand():
    # variances and degrees of freedom of Welch and Satterthwaite, written out
    va, vb = np.var(A, ddof=1) / len(A), np.var(B, ddof=1) / len(B)
    t = (mean(A) - mean(B)) / math.sqrt(va + vb)
    freedom = (va + vb) ** 2 / (va**2 / (len(A) - 1) + vb**2 / (len(B) - 1))
    assert welch(A, B) == pytest.approx(2 * stats.t.sf(abs(t), freedom))
    assert welch(A, B) == pytest.approx(stats.ttest_ind(A, B, equal_var=False).pvalue)
    assert welch(A, B) == welch(B, A)
    assert welch(A, B) != pytest.approx(stats.ttest_ind(A, B[:4]).pvalue)


def differences(a, b):
    return [x - y for x, y in zip(a, b, strict=True)]


def test_the_paired_test_is_scipys():
    assert paired(differences(A, B)) == pytest.approx(stats.ttest_rel(A, B).pvalue)
    assert paired([0.25] * 3) == 0.0
    assert paired([0.0] * 3) == 1.0
    assert paired([0.1, 0.2]) is None


def test_the_detectable_difference_is_found_four_times_of_five():
    # Cohen: with 34 pairs an effect of half a standard deviation is seen with a power of 0.8
    gaps = [1.0, -1.0] * 17
    spread = float(np.std(gaps, ddof=1))
    assert detectable(gaps) / spread == pytest.approx(0.495, abs=0.005)
    draws = np.random.default_rng(0).normal(detectable(gaps), spread, (4_000, 34))
    found = stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=4 * math.sqrt(0.16 / 4_000))
    assert detectable([0.1, 0.2]) is None


@pytest.mark.parametrize(("a", "b"), [(A[:2], B), (A, B[:2]), ((), ())])
def test_too_few_runs_are_not_tested(a, b):
    assert welch(a, b) is None
    assert stars(welch(a, b)) == TOO_FEW


def test_curves_without_spread():
    assert welch([0.1] * 3, [0.1] * 3) == 1.0
    assert welch([0.1] * 3, [0.2] * 3) == 0.0
    assert 0 < welch([0.1] * 3, [0.1, 0.2, 0.3]) < 1


def test_holm_by_hand():
    # sorted: 0.005 * 4, 0.01 * 3, 0.03 * 2, 0.04 -> not below the one before
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([None, 0.02, None]) == [None, 0.02, None]
    assert holm([]) == []


@pytest.mark.parametrize(("p", "expected"), [(0.0499, "*"), (0.05, ""), (1.0, ""), (0.0, "*")])
def test_stars_are_those_of_the_paper(p, expected):
    assert stars(p) == expected


def test_levels_group_by_round_and_order_by_seed():
    rows = [row(2, 1, 0.7), row(0, 1, 0.9), row(1, 1, 0.8), row(0, 0, 0.5), row(1, 0, None)]
    dense, first = levels(rows)
    assert (dense.round, dense.n, dense.values) == (0, 1, (0.5,))
    assert first.seeds == (0, 1, 2)
    assert first.values == (0.9, 0.8, 0.7)
    assert (first.mean, first.low, first.high) == (pytest.approx(0.8), 0.7, 0.9)
    assert first.density == pytest.approx(0.8)


def test_two_rows_of_one_seed_are_refused():
    with pytest.raises(ValueError, match="two of seed 0, round 1: s0 and other"):
        levels([row(0, 1, 0.9), row(0, 1, 0.8, run_id="other")])


def test_levels_of_another_value():
    rows = [row(0, 1, 0.9, early_stop_iteration=4_900)]
    assert levels(rows, "early_stop_iteration")[0].values == (4_900.0,)
    assert levels(rows, "not_there") == ()


def test_compare_leaves_out_the_dense_level_and_corrects_over_the_others():
    a = levels(row(seed, n, value) for n in range(4) for seed, value in enumerate(A))
    b = levels(row(seed, n, value) for n in range(3) for seed, value in enumerate(B))
    first, second = compare(a, b)
    assert (first.round, second.round) == (1, 2)
    assert first.p == paired(differences(A, B)) > 0.05
    assert first.p_welch == welch(A, B) < 0.05
    assert first.p_holm == second.p_holm == pytest.approx(2 * first.p)
    assert first.difference == pytest.approx(mean(A) - mean(B))
    assert first.stars == ""  # by the paired test, which decides
    assert first.seen == detectable(differences(A, B))


def test_a_curve_is_compared_over_the_seeds_of_both_and_with_one_dense_level():
    a = levels(row(seed, n, value) for n in range(1, 3) for seed, value in enumerate(A))
    dense = levels(row(seed, 0, value) for seed, value in enumerate(B[:3]))
    first, second = compare(a, dense)
    assert (first.round, second.round, first.n) == (1, 2, 3)
    assert first.difference == pytest.approx(mean(A[:3]) - mean(B[:3]))


def test_compare_of_two_runs_says_too_few():
    two = levels(row(seed, 1, A[seed]) for seed in range(2))
    (only,) = compare(two, two)
    assert (only.p, only.p_holm, only.stars) == (None, None, TOO_FEW)
