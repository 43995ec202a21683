"""Two profiles beside each other, and what a step costs in each precision."""

import json
import re
from dataclasses import replace
from pathlib import Path

from study_rows import STUDIES, rows

from experiments.__main__ import main
from experiments.show.compare import compare
from experiments.store.store import Store
from experiments.study.networks import CONV2, NETWORKS
from experiments.tools import step_speed


def made(profile: str, seeds: int, more: float) -> list[dict]:
    """Synthetic rows, whose runs are as good under each profile but for `more`."""
    found = rows([STUDIES["same-sign"]], profile=profile, seeds=seeds, rounds=2)
    return [
        row
        | {"test_accuracy": 0.9 + row["seed"] / 100 + more, "iterations": 100, "profile": profile}
        for row in found
    ]


def test_profiles_are_compared_run_by_run_over_shared_seeds():
    table = compare(
        [*made("paper", 3, 0.0), *made("patience", 2, 0.005)], "patience", "paper", "fc"
    )
    lines = {line[:2]: line[2:] for line in table.rows}
    assert len(lines) == 1 + 3 * 3  # the dense run, and three criteria over rounds 0 to 2
    name = "fc criterion=large_final"
    density, seeds, accuracy, other, *points = lines[name, 2][:7]
    assert (density, seeds, accuracy, other) == ("64.00%", 2, "91.00%", "90.50%")
    assert points == ["+0.50", "+0.50", "+0.50"]
    assert lines["fc criterion=none", 0][1] == 2


def test_the_command_reads_several_stores(tmp_path, capsys):
    for profile in ("paper", "patience"):
        store = Store(tmp_path / profile)
        mine = made(profile, 1, 0.0)
        with store.claim({row["run_id"] for row in mine}) as lease:
            store.add(lease, mine, [])
    stores = [str(tmp_path / name) for name in ("paper", "patience")]
    assert main(["compare", "patience", "paper", "--store", *stores]) == 0
    assert len(re.findall(r"\+0\.00 +\+0\.00 +\+0\.00", capsys.readouterr().out)) == 10
    assert main(["compare", "patience", "paper", "--store", stores[0]]) == 1
    assert "no run is there under both profiles, patience and paper" in capsys.readouterr().err
    assert main(["compare", "best", "paper", "--store", stores[0]]) == 1
    assert "profile must be one of paper, coarse" in capsys.readouterr().err


def test_steps_are_timed_in_each_way(tmp_path, monkeypatch, capsys):
    small = replace(CONV2, input_shape=(1, 8, 8), convolutions=(2, 2), hidden=(4, 4))
    monkeypatch.setitem(NETWORKS, "conv2", small)
    monkeypatch.setattr(step_speed, "ROUNDS", (0, 4))
    monkeypatch.setattr(step_speed, "REPEATS", 1)
    monkeypatch.setattr(step_speed, "IMAGES", 50)
    path = Path(tmp_path / "speed.json")
    assert main(["speed", "--network", "conv2", "--json", str(path)]) == 0
    numbers = json.loads(path.read_text())
    assert [row["round"] for row in numbers["rows"]] == [0, 4]
    for row in numbers["rows"]:
        for what in ("step", "evaluation"):
            assert row[what].keys() == step_speed.WAYS.keys()
            assert all(seconds > 0 for seconds in row[what].values())
    assert capsys.readouterr().out.count("conv2 ") == 4
    assert main(["speed", "--network", "fc", "conv2"]) == 1
    assert (
        "network must be fc alone, or of conv2, conv4, conv6; got 'fc'" in capsys.readouterr().err
    )
