"""Learning rates of learned masks: what is looked at."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import lottery_sparse as ls
from experiments.__main__ import main
from experiments.study import runs
from experiments.study.runs import DENSE, Profile, Run
from experiments.tools import tune
from experiments.train import data
from experiments.train.data import Split, load
from experiments.train.learned import learn


@pytest.fixture(scope="module")
def mini():
    return load("mnist-mini")


def test_a_rate_trains_as_a_learned_mask_does(mini, monkeypatch):
    iterations = 88
    monkeypatch.setattr(tune, "DRAWS", 10)
    monkeypatch.setitem(runs.PROFILES, "tiny", Profile("tiny", share=0.0002, mini=True))
    run = Run(
        network="fc", profile="tiny", seed=2, schedule="learned", criterion=DENSE, trained=False
    )
    [learned] = learn([run], mini)
    assert learned.row["iterations"] == iterations
    *looks, last = tune.tune("fc", mini, [run.net.score_lr], iterations, seed=2)
    assert [row["iteration"] for row in looks] == [22, 44, 66]
    assert last["validation_loss"] == learned.row["final_validation_loss"]
    assert last["density"] == pytest.approx(learned.row["expected_density"])


def test_only_training_and_validation_images_are_looked_at(mini):
    none = Split(mini.test.images[:0], mini.test.labels[:0])
    a = list(tune.tune("fc", mini, [30.0], 8))
    assert a == list(tune.tune("fc", replace(mini, test=none), [30.0], 8))
    assert all(0 < row["validation_accuracy"] < 1 for row in a)


def test_rates_start_alike_and_do_not_depend_on_each_other(mini):
    both = list(tune.tune("fc", mini, [1e30, 100.0], 8))
    assert both[4:] == list(tune.tune("fc", mini, [100.0], 8))
    assert both[3]["validation_loss"] > both[7]["validation_loss"]  # saturated, not diverged


def test_the_command_writes_what_it_says(mini, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(data, "load", lambda name, folder, download: mini)
    path = tmp_path / "new" / "t.json"
    options = ["--network", "fc", "--rates", "10", "300", "--iterations", "4", "--json", str(path)]
    assert main(["tune", *options]) == 0
    numbers = json.loads(path.read_text())
    assert [row["rate"] for row in numbers["rows"]] == [10.0] * 4 + [300.0] * 4
    assert numbers["versions"]["lottery_sparse"] == ls.__version__
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 8
    assert said[-1].startswith("rate 300  iteration 4  validation loss ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--iterations 3", "iterations must be 4 or more, got 3"),
        ("--iterations 8 --rates 10 0", "rates must be positive numbers, got [10.0, 0.0]"),
        (
            "--iterations 8 --network vgg",
            "network must be one of fc, conv2, conv4, conv6, or MODULE:ATTR; got",
        ),
    ],
)
def test_what_cannot_be_tuned_is_one_sentence(options, message, mini, monkeypatch, capsys):
    monkeypatch.setattr(data, "load", lambda name, folder, download: mini)
    assert main(["tune", *options.split()]) == 1
    assert message in capsys.readouterr().err
