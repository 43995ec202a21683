"""Masks in numbers: which density counts, what was heading to zero, and what a mask costs."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch

import lottery_sparse as ls
from experiments.findings import compression, densities
from experiments.store.beside import joined
from experiments.store.remakes import readable
from experiments.store.store import Store
from experiments.study import studies
from experiments.study.networks import NETWORKS, build
from experiments.sweep.sweep import run_study
from experiments.train import heading

RESULTS = Path(__file__).parents[2] / "experiments" / "results"


def curve(seed, accuracies, **columns):
    return [
        {
            "seed": seed, "round": number, "density": 0.5**number, "test_accuracy": accuracy,
            **{name: values[number] for name, values in columns.items()},
        }
        for number, accuracy in enumerate(accuracies)
    ]  # fmt: skip


def test_three_ways_to_choose_a_density():
    rows = curve(0, [0.99, 0.2, 0.6, 0.4], validation_accuracy=[0.9, 0.3, 0.3, 0.1])
    rows += curve(1, [0.99, 0.3, 0.2, 0.7], validation_accuracy=[0.9, 0.1, 0.2, 0.5])
    each = densities.chosen(rows, "each")
    assert each.accuracy == {0: 0.6, 1: 0.7}  # round 0, unmasked, is no mask's
    assert each.density == {0: 0.25, 1: 0.125}
    assert densities.chosen(rows, "mean").accuracy == {0: 0.4, 1: 0.7}
    by_validation = densities.chosen(rows, "validation")
    assert by_validation.accuracy == {0: 0.2, 1: 0.7}  # of equals the one with most weights
    del rows[2]["validation_accuracy"]
    assert densities.chosen(rows, "validation") is None
    assert densities.chosen([], "each") is None


def test_a_seed_that_lacks_a_round_is_left_out():
    rows = curve(0, [0.9, 0.2, 0.6]) + curve(1, [0.9, 0.8])
    assert densities.chosen(rows, "each").accuracy == {0: 0.6}


def test_heading_counts_by_hand():
    start = {"w": torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0, 6.0])}
    final = {"w": torch.tensor([0.5, 2.0, -2.0, -5.0, 5.5, 0.0])}
    before = {"w": torch.tensor([True, True, True, True, True, False])}
    after = {"w": torch.tensor([False, False, True, True, False, False])}
    counts = heading.towards_zero(start, final, before, after)
    # pruned now: 1 -> 0.5 towards, -2 -> 2 not (as far from zero), 5 -> 5.5 not
    assert counts == {"w": [3, 1, 2, 1]}
    assert heading.share(counts, "pruned") == pytest.approx(1 / 3)
    assert heading.share(counts, "kept", "w") == 0.5
    assert heading.share({"w": [0, 0, 7, 2]}, "pruned") is None


def test_a_mask_costs_its_entropy():
    assert compression.mask_bits(500, 1_000) == 1_000
    assert compression.mask_bits(0, 1_000) == compression.mask_bits(1_000, 1_000) == 0
    few = compression.mask_bits(10, 1_000)  # an ideal code of "10 of 1,000" needs 77.7 bits
    assert math.log2(math.comb(1_000, 10)) < few < 1.05 * math.log2(math.comb(1_000, 10))


def test_bits_of_networks():
    weights, biases = compression.sizes("fc")
    assert (weights, biases) == (266_200, 410)
    dense = {"network": "fc", "kept": weights, "trained": True}
    assert compression.bits(dense) == compression.dense_bits("fc") == 32 * 266_610
    mask = {"network": "fc", "kept": 26_620, "trained": False}
    assert compression.bits(mask) == compression.mask_bits(26_620, 266_200) + 64
    ticket = compression.bits(mask | {"trained": True})
    assert ticket == compression.mask_bits(26_620, 266_200) + 32 * (26_620 + 410)
    assert compression.share(mask) < 1 / 64


def test_one_density_for_all_layers_costs_no_less_than_one_for_each():
    model = build(NETWORKS["fc"], 0)
    every = ls.Masks(
        {
            n: torch.ones_like(p, dtype=torch.bool)
            for n, p in model.named_parameters()
            if p.dim() > 1
        }
    )
    weights = {n: p.detach() for n, p in model.named_parameters()}
    masks = ls.prune(weights, weights, every, "large_final", 0.1, scope="global")
    by_layer = sum(compression.mask_bits(int(m.sum()), m.numel()) for m in masks.values())
    assert by_layer <= compression.mask_bits(masks.kept, 266_200) + len(masks)


def test_committed_rows_have_the_kept_weights_that_bits_are_made_of():
    lines = (RESULTS / "rows.jsonl").read_text().splitlines()
    for row in map(json.loads, lines[:: max(1, len(lines) // 50)]):
        weights, _ = compression.sizes(row["network"])
        assert row["kept"] == round(row["density"] * weights)
        assert 0 < compression.share(row) <= 1.04


def test_validation_accuracies_and_counts_come_from_the_curves_of_the_store():
    rows = [{"run_id": "a", "round": n, "schedule": "one_shot"} for n in range(3)]
    rows.append({"run_id": "b", "stored_as": "b-again", "round": 1, "schedule": "one_shot"})
    rows.append({"run_id": "c", "round": 4, "schedule": "iterative"})
    entry = {"of": "rounds", "round": 2, "first": 0, "every": 1, "last": 2}
    entry |= {"accuracy": [0.1, 0.2, 0.3], "heading": [{"w": [0, 0, n, 1]} for n in range(3)]}
    chain = {"run_id": "c", "of": "iterations", "round": 4, "accuracy": [0.5, 0.6]}
    curves = [
        {**entry, "run_id": "a"},
        {**entry, "run_id": "b-again"},
        {**chain, "heading": {"w": [4, 3, 2, 1]}},
    ]
    found = joined(rows, curves)
    assert [row.get("validation_accuracy") for row in found] == [0.1, 0.2, 0.3, 0.2, None]
    assert [row["heading"]["w"][2] for row in found] == [0, 1, 2, 1, 2]
    assert joined(rows, []) == rows  # of runs from before there were curves


def test_a_study_stores_what_was_heading_to_zero(tmp_path):
    run = partial(run_study, seeds=1, folder=tmp_path, engine="inline", rounds=2)
    run(studies.find("mask-criteria"), "fc", "smoke", only=[("criterion", "large_final")])
    run(studies.find("supermasks"), "fc", "smoke", only=[("criterion", "large_final")])
    store = Store(tmp_path)
    rows = joined(readable(store.rows()), store.curves())
    for row in rows:
        if row["round"] == 0 and row["schedule"] == "iterative":
            continue  # no round before it
        assert set(row["heading"]) == {"fc1.weight", "fc2.weight", "output.weight"}
        assert sum(counts[2] for counts in row["heading"].values()) == row["kept"]
    [one, other] = (
        row["heading"]
        for row in rows
        if row["round"] == 1 and row["criterion"] == "large_final" and row["weights"] == "init"
    )
    assert one == other  # the first round prunes the dense network, trained after or not
    assert heading.share(one, "pruned") > heading.share(one, "kept")
