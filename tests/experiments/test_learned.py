"""Learned masks as experiments: the protocol, resuming, and what mask and seed alone give back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lottery_sparse as ls
from experiments.study import runs
from experiments.study.networks import build, skeleton
from experiments.study.runs import DENSE, Profile, Run
from experiments.train import learned
from experiments.train.data import load, permuted
from experiments.train.learned import Checkpoints, learn
from experiments.train.loop import evaluation, minibatches

LEARNED = {"schedule": "learned", "trained": False, "criterion": DENSE}


@pytest.fixture(scope="module")
def mini():
    return load("mnist-mini")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A profile of 88 iterations: four epochs of mnist-mini."""
    profile = Profile("tiny", share=0.0002, evaluate_every=5, mini=True)
    monkeypatch.setitem(runs.PROFILES, "tiny", profile)


def run(**changes):
    return Run(**{"network": "fc", "profile": "tiny", "seed": 0, **LEARNED, **changes})


class Memory(Checkpoints):
    """Keeps copies, and may fail after some iterations as if the process had been killed."""

    def __init__(self):
        self.kept = {}
        self.saved = []

    def load(self, run_id):
        return copy.deepcopy(self.kept.get(run_id))

    def save(self, run_id, tensors, metadata):
        self.kept[run_id] = copy.deepcopy((tensors, metadata))
        self.saved.append(metadata["iteration"])


def same(a, b):
    assert a.row == b.row
    assert a.ticket.masks == b.ticket.masks


def test_a_mask_is_learned_and_reported(mini):
    [found] = learn([run(profile="smoke")], mini)
    row = found.row
    assert row["engine"] == ("train_step" if ls.ops.dispatch.built("cpu") else "modules")
    assert row["iterations"] == 440
    assert row["test_accuracy"] == sum(row["sample_accuracies"]) / 10 > 0.75
    assert len(row["sample_accuracies"]) == 10
    assert len(set(row["sample_accuracies"])) > 1
    assert row["threshold_accuracy"] > 0.75
    assert row["density"] == row["kept"] / 266_200 == found.ticket.masks.density
    assert abs(row["density"] - row["expected_density"]) < 0.01
    assert (row["mask_bits"], row["seed_bits"]) == (266_200, 64)
    assert row["products"] == ["dense"] * 3


@pytest.mark.parametrize("weights", ["init", "signed_constant"])
@pytest.mark.parametrize("rescale", [False, True])
def test_mask_and_seed_give_the_network_back(mini, weights, rescale, tmp_path):
    one = run(weights=weights, rescale=rescale, seed=3)
    [found] = learn([one], mini)
    assert found.ticket.bits == {"masks": 266_200, "seeds": 64, "tensors": 0}
    found.ticket.save(tmp_path / "ticket.safetensors")
    assert (tmp_path / "ticket.safetensors").stat().st_size < 266_200 / 8 + 2_000
    model = skeleton(one.net).to_empty(device="cpu")
    ls.Ticket.load(tmp_path / "ticket.safetensors").apply_(model)
    assert evaluation(model, mini.test)[1] == found.row["sample_accuracies"][0]
    model = build(one.net, seed=3)  # and by hand
    for name, mask in found.ticket.masks.items():
        w = model.get_parameter(name).detach()
        if weights == "signed_constant":
            w.copy_(w.sign() * w.std(unbiased=False))
        w.mul_(mask / (mask.float().mean() if rescale else 1))
    assert abs(evaluation(model, mini.test)[1] - found.row["sample_accuracies"][0]) <= 1 / 2000


def test_killed_and_resumed_is_the_same(mini):
    whole = Memory()
    [expected] = learn([run(rescale=True)], mini, whole, every=20)
    assert whole.saved == [20, 40, 60, 80, 88]

    class Killed(Exception):
        pass

    def kill(run, iteration):
        if iteration == 73:
            raise Killed

    resumed = Memory()
    with pytest.raises(Killed):
        next(learn([run(rescale=True)], mini, resumed, every=20, on_step=kill))
    assert resumed.saved == [20, 40, 60]
    steps = []
    [again] = learn(
        [run(rescale=True)], mini, resumed, every=20, on_step=lambda r, i: steps.append(i)
    )
    assert steps == list(range(61, 89))
    same(again, expected)
    for name, tensor in whole.kept[again.run.id][0].items():
        assert torch.equal(resumed.kept[again.run.id][0][name], tensor), name
    [finished] = learn([run(rescale=True)], mini, resumed, on_step=lambda r, i: steps.append(i))
    assert len(steps) == 28  # nothing was left to do but the evaluation
    same(finished, expected)


def test_runs_together_are_the_runs_alone(mini):
    several = [run(seed=1), run(seed=1, permuted="pixels"), run(seed=2, init_score=-1.0)]
    together = list(learn(several, mini))
    assert [found.run for found in together] == several
    for one, found in list(zip(several, together, strict=True))[1:]:
        [alone] = learn([one], mini)
        same(alone, found)
    assert together[0].row["test_accuracy"] != together[1].row["test_accuracy"]
    assert together[2].row["expected_density"] < 0.45


def test_runs_side_by_side_are_the_runs_alone(mini):
    several = [
        run(seed=1), run(seed=1, weights="signed_constant"), run(seed=2, rescale=True),
        run(seed=2, init_score=-1.0), run(seed=3, trained=True), run(seed=3, rescale=True),
    ]  # fmt: skip
    alone, together = Memory(), Memory()
    expected = {found.run: found for found in learn(several, mini, alone, every=20)}
    found = list(learn(several, mini, together, every=20, side_by_side=True))
    assert {len(one.company) for one in found} == {2, 4}  # with and without rescaling
    assert {one.run for one in found} == set(several)
    for one in found:
        same(one, expected[one.run])
        assert one.run in one.company
    for name, (tensors, metadata) in alone.kept.items():
        assert metadata["iteration"] == together.kept[name][1]["iteration"] == 88
        for key, tensor in tensors.items():
            assert torch.equal(together.kept[name][0][key], tensor), (name, key)


def test_company_changes_across_restarts(mini):
    """Three of four were begun, one of them alone and not as far: nobody loses anything."""
    several = [run(seed=seed) for seed in range(4)]
    expected = list(learn(several, mini))
    memory = Memory()

    class Killed(Exception):
        pass

    def kill(at):
        def on_step(run, iteration):
            if iteration == at:
                raise Killed

        return on_step

    for begun, at in ((several[:1], 25), (several[1:3], 50)):
        with pytest.raises(Killed):
            next(learn(begun, mini, memory, every=20, side_by_side=True, on_step=kill(at)))
    begins = {}
    found = list(
        learn(
            several, mini, memory, side_by_side=True,
            on_step=lambda run, iteration: begins.setdefault(run.seed, iteration),
        )
    )  # fmt: skip
    assert begins == {0: 21, 1: 41, 2: 41, 3: 1}
    assert [[r.seed for r in one.company] for one in found] == [[0], [1, 2], [1, 2], [3]]
    for one, other in zip(found, expected, strict=True):
        same(one, other)


def test_by_modules_it_learns_as_well(mini):
    with ls.use_backend("reference"):
        [found] = learn([run()], mini)
    assert found.row["engine"] == "modules"
    [other] = learn([run()], mini)
    assert abs(found.row["test_accuracy"] - other.row["test_accuracy"]) < 0.05


def test_a_learned_mask_is_trained_as_a_ticket(mini):
    [found] = learn([run(trained=True)], mini)
    assert found.row["test_accuracy"] > 0.3
    assert found.row["early_stop_iteration"] > 0
    assert found.row["final_train_accuracy"] is not None
    assert len(found.row["sample_accuracies"]) == 10  # of the mask before the training


def test_diverging_scores_are_said(mini, monkeypatch):
    def spoiled(model, optimizer):
        def step(images, labels):
            for p in model.parameters():
                if p.requires_grad:
                    optimizer.state[p]["momentum_buffer"] = p.data.fill_(torch.nan)

        return "modules", step

    monkeypatch.setattr(learned, "stepper", spoiled)
    with pytest.raises(ValueError, match="not finite at iteration 7; with score_lr 100"):
        next(learn([run()], mini, every=7))


def test_other_runs_are_refused(mini):
    with pytest.raises(ValueError, match="has schedule 'iterative', expected 'learned'"):
        next(learn([Run(network="fc", profile="smoke", seed=0)], mini))


@pytest.mark.parametrize("kind", ["pixels", "classes"])
def test_permutations_are_fixed_and_lose_nothing(mini, kind):
    changed, again = permuted(mini, kind), permuted(mini, kind)
    for part in ("train", "val", "test"):
        old, new, twice = (getattr(d, part) for d in (mini, changed, again))
        assert torch.equal(new.images, twice.images)
        assert torch.equal(new.labels, twice.labels)
        same_images, same_labels = (
            torch.equal(new.images, old.images),
            torch.equal(new.labels, old.labels),
        )
        assert (same_images, same_labels) == (kind == "classes", kind == "pixels")
        if kind == "pixels":
            assert torch.equal(
                new.images.flatten(1).sort(1).values, old.images.flatten(1).sort(1).values
            )
        else:
            pairs = set(zip(old.labels.tolist(), new.labels.tolist(), strict=True))
            assert len(pairs) == len({b for _, b in pairs}) == 10
    assert permuted(mini, "none") is mini
    with pytest.raises(ValueError, match="permuted must be none, pixels or classes; got 'rows'"):
        permuted(mini, "rows")


def test_colours_of_a_pixel_stay_together():
    from experiments.train.data import Dataset, Split

    images = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)
    split = Split(images, torch.tensor([0, 1]))
    new = permuted(Dataset("x", None, split, split, split), "pixels").test.images
    assert not torch.equal(new, images)
    assert torch.equal(new[:, 1] - new[:, 0], images[:, 1] - images[:, 0])


def test_a_network_with_convolutions_learns_by_modules(mini):
    model = nn.Sequential(nn.Conv2d(1, 4, 5, stride=3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))
    ls.supermask_(model)
    engine, step = learned.stepper(model, ls.optim.SGD(model.parameters(), lr=50.0, momentum=0.9))
    assert engine == "modules"
    before = evaluation(model, mini.val)[0]
    for images, labels in minibatches(mini.train, 40, 100, [0]):
        step(images, labels)
    assert evaluation(model, mini.val)[0] < before
