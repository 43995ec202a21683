"""Claims: each can hold and can fail, by the rows it names and by no others."""

from dataclasses import replace
from itertools import product

import pytest
import study_rows

from experiments.findings import claims, predicates
from experiments.findings.claim import DENSE_ARM, ITERATION, RANDOM, Claim
from experiments.findings.claims import CLAIMS
from experiments.findings.judging import Verdict, asked, curves_of, judge, statistics, verdict
from experiments.findings.selection import select
from experiments.study import studies
from experiments.study.runs import Run, rounds_of
from experiments.study.studies import Arm

SHARES = (0.02, 0.1, 0.24, 0.39, 0.5, 0.654, 0.8, 0.855, 0.938, 0.945, 0.953, 0.99)
ITERATIONS = (2_000, 3_300, 3_500, 5_300, 9_000)


def seeds(value: float, count: int = 3) -> dict[int, float]:
    """A statistic that varies a little with the seed."""
    return {seed: value * (1 + 0.0005 * seed) for seed in range(count)}


def found(**arms: float) -> predicates.Found:
    return {name: seeds(value) for name, value in arms.items()}


def said(claim: Claim, values: tuple[float, ...]) -> bool:
    return claim.test({n: seeds(v) for n, v in zip(claim.arms, values, strict=True)})[0]


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: f"{claim.study}: {claim.text}")
def test_every_claim_can_hold_and_can_fail(claim):
    values = ITERATIONS if claim.statistic == ITERATION else SHARES
    if len(claim.arms) > 3:
        cases = [(value,) * len(claim.arms) for value in values]
    else:
        cases = product(values, repeat=len(claim.arms))
    assert {said(claim, case) for case in cases} == {True, False}
    assert claim.original
    assert claim.profiles[0] == "paper"


# ---- tests of a statistic ------------------------------------------------------------------------


def test_beats_wants_a_higher_mean_and_a_small_p():
    test = predicates.beats("a", "b")
    assert test(found(a=0.98, b=0.9))[0]
    assert not test(found(a=0.9, b=0.98))[0]
    noisy = {"a": {0: 0.8, 1: 0.9, 2: 0.99}, "b": {0: 0.83, 1: 0.85, 2: 0.95}}
    assert not test(noisy)[0]
    assert not test({"a": seeds(0.98, 2), "b": seeds(0.9, 2)})[0]  # no test of two seeds


def test_beats_is_paired_by_seed():
    apart = {"a": {0: 0.81, 1: 0.911, 2: 0.9905}, "b": {0: 0.8, 1: 0.9, 2: 0.98}}
    outcome = predicates.beats("a", "b")(apart)
    assert outcome.holds  # the seeds differ by ten points, the arms by one in each
    assert "(Welch: 0.89)" in outcome.numbers
    assert outcome.difference.startswith("+1.05 points, p = 0.000")


def test_beats_may_want_a_level_too():
    test = predicates.beats("a", "b", least=0.5)
    assert test(found(a=0.6, b=0.2)).holds
    assert not test(found(a=0.4, b=0.2)).holds


def test_what_was_not_found_says_what_would_have_been():
    even = {"a": {0: 0.90, 1: 0.92, 2: 0.91}, "b": {0: 0.901, 1: 0.919, 2: 0.910}}
    outcome = predicates.beats("a", "b")(even)
    assert not outcome.holds
    assert "this test sees ±0." in outcome.difference


def test_either_side_wants_both():
    test = predicates.either_side("a", "middle", "b")
    assert test(found(a=0.98, middle=0.95, b=0.9)).holds
    assert not test(found(a=0.95, middle=0.95, b=0.9)).holds
    assert not test(found(a=0.98, middle=0.9, b=0.95)).holds


@pytest.mark.parametrize(
    ("a", "holds"),
    [
        ({0: 0.98, 1: 0.97, 2: 0.975}, True),
        ({0: 0.97, 1: 0.975, 2: 0.972}, True),  # lower in the mean, not by the test
        ({0: 0.977, 1: 0.967, 2: 0.9725}, False),  # lower in each seed, by a quarter of a point
        ({0: 0.98, 1: 0.95, 2: 0.97}, False),  # no test finds it, and it is a lot
    ],
)
def test_no_drop(a, holds):
    arms = {"a": a, "b": {0: 0.979, 1: 0.970, 2: 0.9745}}
    assert predicates.no_drop("a", "b", by=0.005)(arms).holds == holds


def test_compressed_wants_few_bits_and_little_loss():
    test = predicates.compressed("a", "dense", "bits", by=0.02, share=1 / 32)
    assert test(found(a=0.97, dense=0.98, bits=0.03)).holds
    assert not test(found(a=0.97, dense=0.98, bits=0.04)).holds
    assert not test(found(a=0.95, dense=0.98, bits=0.03)).holds


@pytest.mark.parametrize(
    ("a", "b", "holds"), [(0.95, 0.96, False), (0.9581, 0.96, True), (0.97, 0.96, True)]
)
def test_no_worse(a, b, holds):
    assert predicates.no_worse("a", "b", by=0.002)(found(a=a, b=b))[0] == holds


@pytest.mark.parametrize(
    ("a", "least_half", "most_quarter"),
    [
        (0.99, False, True),  # above the top is no fall
        (0.98, False, True),
        (0.96, False, True),
        (0.94, False, False),
        (0.91, True, False),
        (0.80, True, False),
    ],
)
def test_fallen(a, least_half, most_quarter):
    arms = found(a=a, top=0.98, bottom=0.88)
    assert predicates.fallen("a", "top", "bottom", least=0.5)(arms)[0] == least_half
    assert predicates.fallen("a", "top", "bottom", most=0.25)(arms)[0] == most_quarter
    upside_down = found(a=a, top=0.88, bottom=0.98)
    assert not predicates.fallen("a", "top", "bottom", least=0.5)(upside_down)[0]
    assert not predicates.fallen("a", "top", "bottom", most=0.25)(upside_down)[0]


@pytest.mark.parametrize(
    ("a", "b", "holds"), [(0.2, 0.8, True), (0.22, 0.9, False), (0.1, 0.7, False)]
)
def test_apart(a, b, holds):
    arms = {"a": {0: a}, "b": {0: b}}
    assert predicates.apart("a", 0.2, "b", 0.8)(arms)[0] == holds


def test_between_looks_at_every_arm():
    test = predicates.between(0.92, 0.96)
    assert test(found(a=0.93, b=0.95, c=0.94))[0]
    assert not test(found(a=0.93, b=0.97, c=0.94))[0]
    holds, numbers, *_ = test(found(a=0.93, b=0.90, c=0.94))
    assert not holds
    assert numbers.startswith("from b 90.04% (3 seeds) to c 94.05%")


def test_sooner_wants_half_of_the_lead_and_a_small_p():
    test = predicates.sooner("a", "b", times=2)  # half of the lead: 1.5 times
    assert test(found(a=1_000, b=1_600))[0]
    assert not test(found(a=1_000, b=1_400))[0]
    assert not test(found(a=1_600, b=1_000))[0]
    noisy = {"a": {0: 5e2, 1: 1e3, 2: 3e3}, "b": {0: 5e2, 1: 2e3, 2: 6e3}}
    assert not test(noisy)[0]
    assert "a 1,000 iterations (3 seeds) against b 1,601" in test(found(a=1_000, b=1_600))[1]


@pytest.mark.parametrize(
    ("a", "holds"), [(1_000, True), (1_240, True), (1_300, False), (700, False)]
)
def test_as_soon(a, holds):
    assert predicates.as_soon("a", "b", within=0.25)(found(a=a, b=1_000))[0] == holds


# ---- from rows to verdicts -----------------------------------------------------------------------


def rows_of(claim: Claim, values: dict[str, float], network="fc", profile="paper", count=3):
    """Rows of all arms whose statistic is as given, in the claim's rounds; others would mislead."""
    rows = []
    for name, changes in claim.arms.items():
        for seed in range(count):
            run = Arm(tuple(changes.items())).run(network, profile, seed)
            for row in study_rows.of_run(run, 24):
                there = row["round"] in asked(claim, changes, rounds_of(run, max(claim.rounds)))
                row |= {"test_accuracy": 0.5, "early_stop_iteration": 1, "density": 0.5}
                row[claim.statistic] = seeds(values[name], count)[seed] if there else 0.5
                rows.append(row)
    return rows


def verdict_of(claim: Claim, rows, network="fc", profile="paper") -> Verdict:
    [its] = [v for v in judge(rows, network, profile, claim.study) if v.claim is claim]
    return its


def the(text: str, study: str) -> Claim:
    [claim] = [c for c in CLAIMS if c.study == study and "fc" in c.networks and text in c.text]
    return claim


@pytest.mark.parametrize(
    ("study", "text", "good", "bad"),
    [
        (
            "early-stop", "before the dense",
            {"ticket": 3_200, "dense": 5_200}, {"ticket": 4_500, "dense": 5_200},
        ),
        (
            "early-stop", "as slow as the dense",
            {"ticket": 5_200, "dense": 5_200}, {"ticket": 9_000, "dense": 5_200},
        ),
        (
            "early-stop", "before reinit",
            {"ticket": 3_000, "reinit": 7_500}, {"ticket": 3_000, "reinit": 5_000},
        ),
        (
            "early-stop", "better there than reinit",
            {"ticket": 0.984, "reinit": 0.979}, {"ticket": 0.979, "reinit": 0.984},
        ),
        (
            "mask-1", "below the dense",
            {"dense": 0.98, "reinit": 0.97}, {"dense": 0.97, "reinit": 0.98},
        ),
        (
            "late-rewinding", "rewinding to 2.0%",
            {"the start": 0.98, "later": 0.981}, {"the start": 0.98, "later": 0.985},
        ),
        (
            "learned-sensitivity", "how much",
            {"score -4": 0.07, "score 4": 0.89}, {"score -4": 0.3, "score 4": 0.6},
        ),
        (
            "learned-sensitivity", "equally good",
            dict.fromkeys([f"score {s}" for s in range(-2, 3)], 0.945),
            dict.fromkeys([f"score {s}" for s in range(-2, 3)], 0.9),
        ),
        (
            "permutation", "pixels",
            {"permuted": 0.951, "as it is": 0.953}, {"permuted": 0.9, "as it is": 0.953},
        ),
        (
            "permutation", "classes",
            {"permuted": 0.951, "as it is": 0.953}, {"permuted": 0.9, "as it is": 0.953},
        ),
        (
            "learned", "best mask of a criterion",
            {"learned": 0.953, "large_final_same_sign": 0.86},
            {"learned": 0.8, "large_final_same_sign": 0.86},
        ),
        (
            "learned", "closes most",
            {"rescaled": 0.978, "dense": 0.977, "not rescaled": 0.953},
            {"rescaled": 0.955, "dense": 0.977, "not rescaled": 0.953},
        ),
    ],
)  # fmt: skip
def test_rows_decide(study, text, good, bad):
    claim = the(text, study)
    assert verdict_of(claim, rows_of(claim, good)).status == "holds"
    assert verdict_of(claim, rows_of(claim, bad)).status == "fails"
    if claim.few == 3:
        assert verdict_of(claim, rows_of(claim, good, count=2)).status == "too few runs"
    assert verdict_of(claim, rows_of(claim, good, count=1)).status == "too few runs"
    assert verdict_of(claim, []).status == "not run"
    other = verdict_of(claim, rows_of(claim, good, profile="short"), profile="short")
    assert other.status == "not a deciding profile"


def test_a_round_that_is_missing_leaves_the_seed_out():
    claim = the("rewinding to 2.0%", "late-rewinding")
    rows = rows_of(claim, {"the start": 0.98, "later": 0.98}, count=4)
    assert verdict_of(claim, rows).numbers.count("(4 seeds)") == 2
    gone = [r for r in rows if (r["seed"], r["round"], r["rewind_to"]) != (3, 16, 0)]
    assert verdict_of(claim, gone).numbers.count("(3 seeds)") == 2


def test_arms_are_compared_over_the_same_seeds():
    claim = the("beat the dense", "mask-criteria")
    rows = rows_of(claim, {"ticket": 0.98, "dense": 0.97}, count=3)
    better = Run(network="fc", profile="paper", seed=3, criterion="none")
    rows += [row | {"test_accuracy": 1.0} for row in study_rows.of_run(better, 0)]
    its = verdict_of(claim, rows)  # a fourth dense network has no ticket to be compared with
    assert its.status == "holds"
    assert "dense 97.05% (3 seeds)" in its.numbers


def test_a_best_claim_takes_each_run_at_its_best():
    claim = replace(
        the("best mask of a criterion", "learned"),
        arms={"a": {**studies.UNTRAINED, **RANDOM}, "b": DENSE_ARM},
        test=predicates.beats("b", "a"),
    )
    by_run = {}
    for seed in range(3):
        mask = Run(
            network="fc", profile="paper", seed=seed, criterion="random", **studies.UNTRAINED
        )
        top = 5 + seed  # another round for each seed
        by_run[mask.id] = {
            r: {
                "seed": seed,
                "round": r,
                "density": 0.8**r,
                "test_accuracy": 0.1 + 0.8 * (r == top),
            }
            for r in range(21)
        }
        if seed < 2:
            by_run[mask.dense.id] = {0: {"test_accuracy": 0.98}}
    curves = curves_of(claim, "fc", "paper", by_run, range(3))
    assert statistics(claim, curves) == {  # the third seed has no dense network
        "a": {0: pytest.approx(0.9), 1: pytest.approx(0.9)},
        "b": {0: 0.98, 1: 0.98},
    }
    its = verdict(claim, "fc", "paper", by_run, range(3))
    assert its.status == "too few runs"
    assert "best density of the mean curve: a 50.00%" in its.numbers
    assert "density chosen on validation data: not recorded" in its.numbers
    for rows in by_run.values():
        for number, row in rows.items():
            row["validation_accuracy"] = 0.9 if number == 7 else 0.2
    its = verdict(claim, "fc", "paper", by_run, range(3))
    assert "density chosen on validation data: a 10.00%" in its.numbers


def test_no_drop_is_judged_level_by_level():
    claim = the("at each of rounds 14 to 20", "mask-criteria")
    rows = rows_of(claim, {"ticket": 0.98, "dense": 0.98})
    its = verdict_of(claim, rows)
    assert (its.status, its.ours) == ("holds", "holds at 7 of 7 levels")
    for row in rows:
        if row["criterion"] == "large_final" and row["round"] == 17:
            row["test_accuracy"] -= 0.003  # in the mean of seven levels nothing
            row["density"] = 0.023
    its = verdict_of(claim, rows)
    assert (its.status, its.ours) == ("fails", "holds at 6 of 7 levels")
    assert "fails at round 17 (2.3% kept): -0.30 points" in its.numbers
    assert [number for number, outcome in its.levels.items() if not outcome.holds] == [17]


@pytest.mark.parametrize("network", ["fc", "conv2"])
def test_a_claim_names_the_profiles_that_can_decide_it(network):
    claim = the("Variant 1 is as good", "mask-0")

    def status(rows):
        [its] = [v for v in judge(rows, network, None, "mask-0") if v.claim is claim]
        return its.status, its.profile

    # coarse has rounds 16 and 20 alone of 14 to 20
    rows = rows_of(claim, {"zero": 0.97, "Variant 1": 0.98}, network, "coarse")
    rows = [row for row in rows if row["round"] % 4 == 0]
    assert status(rows) == ("holds", "coarse")
    # the paper's rows decide where there are enough of them
    worse = {"zero": 0.98, "Variant 1": 0.97}
    assert status(rows + rows_of(claim, worse, network)) == ("fails", "paper")
    assert status(rows + rows_of(claim, worse, network, count=2)) == ("holds", "coarse")
    gone = [row for row in rows if (row["seed"], row["round"]) != (0, 16)]
    assert status(gone) == ("too few runs", "coarse")


def test_coarse_decides_nothing_of_speed():
    speed = the("before the dense", "early-stop")
    rows = rows_of(speed, {"ticket": 3_200, "dense": 5_200}, profile="coarse")
    [its] = [v for v in judge(rows, "fc", "coarse", "early-stop") if v.claim is speed]
    assert its.status in ("not a deciding profile", "not run")
    [its] = [v for v in judge(rows, "fc", None, "early-stop") if v.claim is speed]
    assert (its.status, its.profile) == ("not run", "paper")


def test_shares_that_moved_to_zero_decide():
    claim = the("that large_final prunes more were", "supermasks")
    rows = []
    for seed in range(3):
        changes = tuple(claim.arms["pruned"].items())
        for row in study_rows.of_run(Arm(changes).run("fc", "paper", seed), 20):
            row["heading"] = {"fc1.weight": [100, 60 + seed, 50, 10], "output.weight": [0, 0, 5, 2]}
            rows.append(row)
    its = verdict_of(claim, rows)
    assert its.status == "holds"
    assert its.numbers.startswith("pruned 61.00% (3 seeds) against kept 21.82% (3 seeds)")
    for row in rows:
        del row["heading"]  # rows from before they were counted
    assert verdict_of(claim, rows).status == "not run"


def test_studies_that_nobody_published_claim_nothing():
    silent = set(studies.STUDIES) - {claim.study for claim in CLAIMS}
    assert silent == {
        "dense",
        "same-sign",
        "early-masks",
        "rescaling",
        "learned-trained",
        "choices",
    }


def test_moments_of_late_rewinding_are_all_claimed():
    moments = {
        claim.arms["later"]["rewind_to"] for claim in CLAIMS if claim.study == "late-rewinding"
    }
    study = studies.STUDIES["late-rewinding"]
    assert moments | {0.0} == {dict(arm.changes)["rewind_to"] for arm in study.arms()}


# ---- arms that coincide --------------------------------------------------------------------------


def test_arms_that_round_to_one_iteration_are_one_curve():
    study = studies.STUDIES["late-rewinding"]
    assert len(study.runs("fc", "paper", (0, 1))) == 12
    runs = study.runs("fc", "smoke", (0, 1))
    assert len(runs) == len(set(runs)) == 8  # 51 iterations: 0 and 0.2% are 0, 1% and 2% are 1
    rows = [row for run in runs for row in study_rows.of_run(run, 3)]
    shown = select(study, "fc", "smoke", rows).curves
    assert [curve.label for curve in shown] == [
        "rewind_to 0 = rewind_to 0.002",
        "rewind_to 0.01 = rewind_to 0.02",
        "rewind_to 0.05",
        "rewind_to 0.1",
    ]
    masks = studies.STUDIES["early-masks"]
    rows = [row for run in masks.runs("fc", "smoke", (0,)) for row in study_rows.of_run(run, 3)]
    labels = [curve.label for curve in select(masks, "fc", "smoke", rows).curves]
    assert labels[1] == "large_final, init, final_at 0.01 = final_at 0.02"
    assert select(study, "fc", "paper", rows).missing == tuple(arm.label for arm in study.arms())


def test_texts_are_one_sentence_each():
    for claim in CLAIMS:
        assert claim.text[0].islower() or claim.text.startswith("Variant")
        assert not claim.text.endswith(".")
    assert len({(claim.study, claim.text, claim.networks) for claim in CLAIMS}) == len(
        claims.CLAIMS
    )
