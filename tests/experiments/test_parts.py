"""Somebody else's network, data set and criterion, from the command line and from Python."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from experiments.__main__ import main, parser
from experiments.show import commands as shows
from experiments.store.machine import numerics
from experiments.store.store import Store
from experiments.study import parts
from experiments.study.networks import build, check_fits, find, keep_by_parameter, kinds
from experiments.study.runs import Run, run_in, run_of
from experiments.train import data, models
from experiments.train import loop as train
from lottery_sparse.pruning.prune import keep_count

ROOT = Path(__file__).resolve().parents[2]
OURS = ["--network", "tests.toy:resnet", "--dataset", "tests.toy:stripes"]
pytestmark = pytest.mark.usefixtures("any_arithmetic")


@pytest.fixture(autouse=True)
def root_and_one_thread(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))  # where `python -m experiments` starts
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# the example of experiments/README.md


def documented() -> list[str]:
    """The words of the command in the README, toy size in place of the real one."""
    text = (ROOT / "experiments" / "README.md").read_text()
    command = next(part for part in text.split("```") if "--network tests.toy:resnet" in part)
    return command.replace("\\\n", " ").split("python -m experiments ")[1].split("\n")[0].split()


def test_the_documented_example_runs(tmp_path):
    words = documented()
    assert {"--network", "--dataset", "--criterion", "--rounds"} <= set(words)
    store = tmp_path / "store"
    arguments = [*words, "--store", str(store), "--numerics", str(numerics()), "--workers", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "experiments", *arguments],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"LS_BACKEND": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = Store(store).rows()
    assert {(row["criterion"], row["round"]) for row in rows} == {
        ("none", 0), *(("tests.toy:spread", number) for number in range(3)),
    }  # fmt: skip
    for row in rows:
        assert (row["network"], row["data"]) == ("tests.toy:resnet", "tests.toy:stripes")
        assert row["test_accuracy"] > 0.4  # of four kinds; with what batch norm has learned
    last = max(rows, key=lambda row: row["round"])
    network = find("tests.toy:resnet")
    sizes = {name: p.numel() for name, p in build(network, 0).named_parameters()}
    kept = [
        keep_count(keep_count(sizes[n], share), share)
        for n, share in keep_by_parameter(network).items()
    ]
    assert last["kept"] == sum(kept)


def test_rows_and_tables_of_it_are_shown(tmp_path, capsys):
    command = [
        "mask-criteria", *OURS, "--criterion", "tests.toy:spread", "random", "--profile", "smoke",
        "--store", f"{tmp_path}",
    ]  # fmt: skip
    assert main(["run", *command, "--rounds", "1", "--seeds", "1", "--engine", "inline"]) == 0
    assert {row["study"] for row in Store(tmp_path).rows()} == {"dense", "mask-criteria"}
    capsys.readouterr()
    assert main(["table", *command]) == 0
    said = capsys.readouterr().out
    assert "mask-criteria-tests.toy.resnet-tests.toy.stripes-smoke" in said
    assert "tests.toy:spread" in said
    [selection] = shows._selections(options(command), Store(tmp_path))
    assert selection.place == "tests.toy:resnet on tests.toy:stripes"
    assert main(["status", *command, "--seeds", "1"]) == 0
    assert "5 / 9" in capsys.readouterr().out  # two rounds more in the study's
    assert main(["claims", "--store", f"{tmp_path}", "--profile", "smoke"]) == 1  # of no claim
    assert "no rows in" in capsys.readouterr().err


def options(command):
    return parser().parse_args(["table", *command])


# what a run of it is


def ours(**changes) -> Run:
    paths = {"network": "tests.toy:resnet", "criterion": "tests.toy:spread"}
    return Run(**{**paths, "profile": "smoke", "seed": 0, "data": "tests.toy:stripes", **changes})


def test_ids_hold_the_text_of_the_files(monkeypatch):
    assert ours().id.startswith("tests.toy.resnet-tests.toy.spread-tests.toy.stripes-s0-smoke-")
    before = replace(ours()).id
    monkeypatch.setattr(parts, "digest", lambda path: "another text")
    assert replace(ours()).id != before
    assert ours(seed=1).id != ours().id != ours(data="").id


def test_ids_are_the_same_in_a_process_that_has_imported_nothing(module):
    before = replace(ours(data="theirs:pair", criterion="theirs:two")).id
    sys.modules.pop("theirs")
    for cached in (parts.attribute, parts.digest):
        cached.cache_clear()
    assert replace(ours(data="theirs:pair", criterion="theirs:two")).id == before


def test_rows_are_read_without_an_import():
    run = Run(network="gone.away:net", profile="smoke", seed=0, criterion="gone.away:score")
    assert run_of({**run.named}) == run
    assert run.named["network"] == "gone.away:net"
    assert "gone" not in sys.modules


def test_initial_weights_are_a_function_of_the_seed():
    torch.manual_seed(5)
    network = find("tests.toy:resnet")
    state = torch.random.get_rng_state()
    a, b, other = (build(network, seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["0.weight"], other["0.weight"])


def test_kinds_are_those_of_layers():
    found = kinds(find("tests.toy:resnet"))
    assert found["0.weight"] == found["5.conv2.weight"] == "conv"
    assert [name for name, kind in found.items() if kind == "output"] == ["14.weight"]
    assert len(found) == 20  # the layers of ResNet-20
    assert kinds(find("fc")) == {
        "fc1.weight": "hidden", "fc2.weight": "hidden", "output.weight": "output"
    }  # fmt: skip


def test_a_coarse_run_of_it_is_laid_as_the_profile_says():
    run = run_in("coarse", "tests.toy:resnet", 0)
    assert (run.precision, run.layout, run.form) == ("bfloat16", "channels_last", "masked")
    model = build(run.net, 0)
    seen = []
    model.get_submodule("14").register_forward_hook(lambda m, i, y: seen.append(y.dtype))
    assert model(torch.rand(2, 1, 8, 8)).dtype == torch.float32
    assert seen == [torch.bfloat16]
    assert set(model.state_dict()) == set(build(find("tests.toy:resnet"), 0).state_dict())


# batch norm


class Memory(train.Midway):
    def __init__(self, due_at=None):
        self.kept, self.looks, self.due_at = None, 0, due_at

    def load(self):
        return self.kept

    def is_due(self):
        self.looks += 1
        return self.looks == self.due_at

    def save(self, tensors, metadata):
        self.kept = {name: t.detach().clone() for name, t in tensors.items()}, metadata


def fit(model, midway=None, on_step=lambda i: None):
    return train.train(
        model, data.load("tests.toy:stripes"), seed=0, iterations=24, lr=1e-2, batch_size=60,
        evaluate_every=4, midway=midway, on_step=on_step,
    )  # fmt: skip


def test_what_batch_norm_averages_is_part_of_the_weights():
    network = find("tests.toy:resnet")
    model, best = build(network, 0), {}

    def keep(iteration):
        best[iteration] = models.weights_of(model)

    result = fit(model, on_step=keep)
    assert model.training
    weights = models.weights_of(model)
    assert int(weights["1.num_batches_tracked"]) == 24
    start = models.dense_start(network, 0, "cpu")
    assert int(start.weights["1.num_batches_tracked"]) == 0
    at = result.early_stop_iteration
    again = models.model_of(network, start._replace(weights=best.get(at, start.weights)), "cpu")
    stripes = data.load("tests.toy:stripes")
    assert train.evaluation(again, stripes.test)[1] == result.test_accuracy
    # an evaluation changes no average, and does not depend on what is evaluated with it
    loss = train.evaluation(again, stripes.val)
    assert train.evaluation(again, stripes.val) == loss


def test_a_killed_training_of_it_goes_on_to_the_same_bits():
    network, memory = find("tests.toy:resnet"), Memory(due_at=3)
    whole = build(network, 0)
    expected = fit(whole)
    killed = build(network, 0)
    with pytest.raises(KeyboardInterrupt):
        fit(killed, memory, on_step=interrupt_at(14))
    resumed = build(network, 1)  # all of it comes from the state
    found = fit(resumed, memory)
    assert replace(found, seconds=0.0) == replace(expected, seconds=0.0)
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name


def interrupt_at(last):
    def on_step(iteration):
        if iteration == last:
            raise KeyboardInterrupt

    return on_step


# what is not to be had


MODULE = """
import torch
from torch import nn
from fractions import Fraction
from experiments.study.networks import Network

number = 3
def fails(): raise RuntimeError("no luck\\nat all")
def a_list(): return [1]
def no_layers(): return nn.Flatten()
def flat(): return nn.Sequential(nn.Flatten(0), nn.LazyLinear(10))
def wide(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
def whole(): return nn.Sequential(nn.Conv2d(1, 4, 3))
def right(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
silent = Network("silent", "mnist", 1e-3, 10, {"hidden": Fraction(1)}, build=whole)
def mean(w_init, w_final, generator): return w_final.mean()
def two(w_init, w_final): return w_final
def images(*shape): return torch.zeros(shape or (6, 1, 8, 8), dtype=torch.uint8)
labels = torch.arange(6) % 4
pair = images(), labels
two_parts = pair, pair
flat_images = [(torch.zeros(6, 64), labels), pair, pair]
few_labels = [pair, (images(), labels[:5]), pair]
float_labels = [pair, pair, (images(), labels.float())]
other_shapes = [pair, (images(6, 1, 9, 9), labels), pair]
not_numbers = [(torch.full((6, 1, 8, 8), float("nan")), labels), pair, pair]
negative = [(images(), labels - 1), pair, pair]
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "theirs.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("import nothing_of_the_kind")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("theirs", None)
    for cached in (parts.attribute, parts.criterion, parts.digest):
        cached.cache_clear()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--network away:net", "network away:net is not to be had: there is no such module"),
        ("--network broken:net", "its import fails (ModuleNotFoundError: No module named 'nothing"),
        ("--network theirs:net", "network theirs:net is not to be had: theirs has no net."),
        ("--network theirs:", "network must be a name or MODULE:ATTR, got 'theirs:'"),
        ("--network theirs:number", "must be a Network, or a function that gives a torch module"),
        ("--network theirs:fails", "theirs:fails cannot be built (RuntimeError: no luck)"),
        ("--network theirs:a_list", "theirs:a_list must give a torch module, got a list"),
        ("--network theirs:no_layers", "theirs:no_layers has no nn.Linear or nn.Conv2d"),
        ("--network theirs:silent", "has conv layers, but its keep says only what a round leaves"),
        (
            "--network theirs:wide",
            "theirs:wide gives [2, 3] of float32 for images [2, 1, 8, 8] of tests.toy:stripes, "
            "wanted logits [2, 4], or more of them.",
        ),
        ("--network theirs:whole", "theirs:whole gives [2, 4, 6, 6] of float32 for images"),
        ("--network fc", "fc does not take images [2, 1, 8, 8] of tests.toy:stripes (RuntimeErr"),
        ("--criterion theirs:number", "theirs:number must be a function (w_init, w_final, gener"),
        ("--criterion theirs:mean", "must give a score per weight, [6], got [] of float32"),
        ("--criterion theirs:two", "theirs:two fails on two vectors of 6 weights and a generator"),
        ("--criterion largest", "criterion must be one of large_final, "),
        ("--dataset theirs:number", "must give three pairs (images, labels), to train, validate"),
        ("--dataset theirs:two_parts", "train, validate and test; got a tuple of 2."),
        ("--dataset theirs:fails", "dataset theirs:fails cannot be made (RuntimeError: no luck)"),
        (
            "--dataset theirs:flat_images",
            "images [n, channels, height, width], uint8 or floats, and labels [n] from 0 on, whole "
            "numbers, to train; got [6, 64] of float32 and [6] of int64.",
        ),
        ("--dataset theirs:few_labels", "to validate; got [6, 1, 8, 8] of uint8 and [5] of int64"),
        ("--dataset theirs:float_labels", "to test; got [6, 1, 8, 8] of uint8 and [6] of float32"),
        ("--dataset theirs:other_shapes", "images of one shape; got [1, 8, 8] and [1, 9, 9]"),
        ("--dataset theirs:not_numbers", "to train; got [6, 1, 8, 8] of float32 and"),
        ("--dataset theirs:negative", "labels [n] from 0 on, whole numbers, to train; got"),
        ("--dataset svhn", "dataset is one of mnist, fashion-mnist, mnist-mini, cifar10, or MOD"),
    ],
)
def test_what_is_not_to_be_had_is_one_sentence(options, message, module, tmp_path, capsys):
    command = ["run", "mask-criteria", *OURS, "--profile", "smoke", *options.split()]
    assert main([*command, "--store", f"{tmp_path / 'store'}"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert message in said
    assert not (tmp_path / "store").exists()


def test_masks_of_others_networks_are_not_learned(tmp_path, capsys):
    command = ["run", "learned", *OURS, "--profile", "smoke", "--store", f"{tmp_path / 'store'}"]
    assert main(command) == 1
    assert "network must be one of fc, conv2, conv4, conv6 for learned" in capsys.readouterr().err


def test_a_plain_function_has_a_protocol(module):
    network = find("theirs:right")
    assert (network.dataset, network.lr, network.batch_size) == ("cifar10", 3e-4, 60)
    check_fits(network, torch.rand(2, 1, 8, 8), 10, "theirs")
    assert isinstance(build(network, 0), nn.Sequential)


def test_a_dataset_is_divided_as_it_is_given():
    stripes = data.load("tests.toy:stripes")
    assert [len(part) for part in (stripes.train, stripes.val, stripes.test)] == [240, 40, 40]
    assert stripes.train.images.dtype == torch.float32
    assert 0 <= stripes.train.images.min() < stripes.train.images.max() <= 1
    assert stripes.classes == 4
    with pytest.raises(
        ValueError, match=r"dataset tests\.toy:gone is not to be had: tests\.toy has no gone"
    ):
        data.load("tests.toy:gone")
