"""Precision, layout and form of a run, patience, and rounds apart: the profile `coarse`."""

import json
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from tolerances import close
from torch.nn import functional as F

import lottery_sparse as ls
from experiments.store import arithmetic, checkpoints
from experiments.store.records import Recorder
from experiments.store.store import OtherNumbers, Store
from experiments.study import runs, studies
from experiments.study.networks import CONV2, CONV4, FC, NETWORKS, build, columns_as_laid
from experiments.study.runs import DENSE, PROFILES, Profile, Run, rounds_of, run_in, run_of
from experiments.sweep.execute import execute, groups
from experiments.train import data
from experiments.train import loop as train
from experiments.train.lottery import lottery
from experiments.train.models import dense_start, model_of
from lottery_sparse.tickets.round import Began

SMALL = replace(
    CONV2,
    dataset="mnist",
    input_shape=(1, 28, 28),
    convolutions=(4, 6),
    hidden=(8, 8),
    iterations=24,
    lr=1e-2,
)
COARSE = {"precision": "bfloat16", "layout": "channels_last", "form": "masked"}
RESULTS = Path(__file__).resolve().parents[2] / "experiments" / "results"


@pytest.fixture(scope="module")
def tiny() -> data.Dataset:
    mini = data.load("mnist-mini")

    def first(part: data.Split, count: int) -> data.Split:
        return data.Split(part.images[:count], part.labels[:count])

    return replace(
        mini, train=first(mini.train, 600), val=first(mini.val, 100), test=first(mini.test, 100)
    )


@pytest.fixture
def small(monkeypatch, any_arithmetic):
    """The commands' conv2 and coarse profile, small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    coarse = replace(PROFILES["coarse"], evaluate_every=2, mini=True)
    monkeypatch.setitem(NETWORKS, "conv2", SMALL)
    monkeypatch.setitem(PROFILES, "coarse", coarse)
    yield
    torch.set_num_threads(threads)


def do(store: Store, wanted: list[Run], rounds: int, dataset: data.Dataset) -> None:
    with store.claim([run.id for run in wanted]) as lease:
        execute(wanted, rounds, store, lease, dataset, lambda text: None)


def masked_start(network, density: float = 0.3, frozen: bool = False):
    """All layers pruned at random, the same weights in either layout; and its masks by name."""
    dense = dense_start(replace(network, layout="contiguous", form="compact"), 0, "cpu")
    gen = torch.Generator().manual_seed(1)
    masks, held = {}, {}
    for name in dense.masks:
        shape = dense.weights[name].shape
        mask = torch.rand(shape, generator=gen) < density
        masks[name] = columns_as_laid(network, name, mask)
        if frozen:
            held[name] = columns_as_laid(network, name, torch.randn(shape, generator=gen))
    weights = {name: columns_as_laid(network, name, w) for name, w in dense.weights.items()}
    return Began(ls.Masks(masks), weights, held)


# layout, precision, form


def test_channels_last_computes_the_same_network():
    images = torch.rand(5, 1, 28, 28, dtype=torch.float64)
    labels = torch.arange(5)
    plain = build(SMALL, 3).double()
    network = replace(SMALL, layout="channels_last")
    laid = build(network, 3).double()
    for model in (plain, laid):
        F.cross_entropy(model(images), labels).backward()
    close(laid(images), plain(images))
    for (name, p), q in zip(plain.named_parameters(), laid.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert torch.equal(q, columns_as_laid(network, name, p))
        close(q.grad, columns_as_laid(network, name, p.grad))


def test_maps_are_flattened_where_they_lie():
    model = build(replace(CONV4, layout="channels_last"), 0)
    maps = torch.rand(2, 128, 8, 8).contiguous(memory_format=torch.channels_last)
    flat = model.get_submodule("flatten")(maps)
    assert flat.data_ptr() == maps.data_ptr()
    assert torch.equal(flat[1, 128:256], maps[1, :, 0, 1])


def test_bfloat16_is_that_of_products_alone():
    network = replace(SMALL, **COARSE)
    model = build(network, 0)
    seen = []
    for name in ("conv2", "fc1", "output"):
        model.get_submodule(name).register_forward_hook(lambda m, i, y: seen.append(y.dtype))
    logits = model(torch.rand(3, 1, 28, 28))
    logits.sum().backward()
    assert seen == [torch.bfloat16] * 3
    assert logits.dtype == torch.float32
    assert {t.dtype for p in model.parameters() for t in (p, p.grad)} == {torch.float32}


@pytest.mark.parametrize("frozen", [False, True])
def test_weights_that_rest_train_as_compact_ones(tiny, frozen):
    network = replace(SMALL, iterations=6, lr=1e-3)
    trained = {}
    for form in ("compact", "masked"):
        at = replace(network, form=form)
        start = masked_start(at, frozen=frozen)
        model = model_of(at, start, "cpu")
        train.train(model, tiny, seed=0, iterations=6, lr=1e-3, batch_size=60)
        trained[form] = ls.dense_state_dict(model)
        for name, mask in start.masks.items():
            assert torch.equal(trained[form][name][~mask], start.effective(name)[~mask])
            assert not torch.equal(trained[form][name][mask], start.effective(name)[mask])
    for name, value in trained["compact"].items():
        # six steps of Adam, of 1e-3 each: where a gradient is all rounding, its sign may differ
        assert (value - trained["masked"][name]).abs().max() <= 12e-3
        assert (value - trained["masked"][name]).abs().mean() <= 1e-4


def test_a_profile_decides_the_literals_and_not_the_host():
    for network in ("conv2", "conv4", "conv6"):
        run = run_in("coarse", network, 0)
        assert {name: getattr(run, name) for name in COARSE} == COARSE
        assert {name: getattr(run.dense, name) for name in COARSE} == COARSE
        assert run.id != Run(network=network, profile="coarse", seed=0).id
        assert run_of(json.loads(json.dumps(run.named))) == run
        assert run_in("paper", network, 0) == Run(network=network, profile="paper", seed=0)
    assert run_in("coarse", "fc", 0) == Run(network="fc", profile="coarse", seed=0)
    learned = {"schedule": "learned", "criterion": DENSE, "trained": False}
    assert run_in("coarse", "conv2", 0, **learned).precision == "float32"
    assert studies.home(run_in("coarse", "conv6", 1, mask0="freeze_init")) == "mask-0"


def test_rows_that_are_committed_are_those_of_the_same_runs():
    rows = [json.loads(line) for line in (RESULTS / "rows.jsonl").read_text().splitlines()]
    assert len(rows) > 2_000
    for row in rows:
        assert run_of(row).id == row["run_id"]


@pytest.mark.parametrize(("factor", "warns"), [(0.5, 0), (3.0, 1)])
def test_a_slow_precision_is_said(monkeypatch, recwarn, factor, warns):
    monkeypatch.setattr(arithmetic, "slowdown", {"bfloat16": factor}.__getitem__)
    arithmetic.warn_if_slow(run_in("coarse", "conv2", 0), "cpu")
    arithmetic.warn_if_slow(run_in("coarse", "fc", 0), "cpu")
    assert len(recwarn) == warns
    if warns:
        text = str(recwarn[0].message)
        assert "bfloat16 takes 3.0 times as long as float32" in text
        assert "the profile alone decides precision" in text


# patience


def fit(tiny, seeds, model=None, **changes):
    settings = {"iterations": 60, "lr": 3e-2, "batch_size": 60, "evaluate_every": 2}
    model = model or build(FC, seeds[0])
    return train.train_together(model, tiny, seeds=seeds, **{**settings, **changes})


def test_patience_ends_a_training_and_changes_nothing_before(tiny):
    [whole] = fit(tiny, [0])
    [ended] = fit(tiny, [0], patience=10)
    assert ended.iterations == ended.early_stop_iteration + 10 < 60
    assert ended.evaluations == whole.evaluations[: len(ended.evaluations)]
    losses = [e.validation_loss for e in ended.evaluations]
    lowest = [losses.index(min(losses[: i + 1])) for i in range(len(losses))]
    assert all(i - at < 5 for i, at in enumerate(lowest[:-1]))  # it did not end too late
    [late] = fit(tiny, [0], patience=60)
    assert replace(late, seconds=0.0) == replace(whole, seconds=0.0)


def test_each_of_several_networks_has_its_own_patience(tiny):
    def models():
        return [model_of(FC, masked_start(FC, density), "cpu") for density in (0.3, 0.02)]

    together = ls.ensemble.replicate(models())
    side = fit(tiny, [0, 1], together, patience=6)
    for e, model in enumerate(models()):
        [alone] = fit(tiny, [e], model, patience=6)
        assert replace(side[e], seconds=0.0) == replace(alone, seconds=0.0)
        for name, value in ls.dense_state_dict(model).items():
            assert torch.equal(value, ls.dense_state_dict(ls.ensemble.select(together, e))[name])
    assert side[0].iterations != side[1].iterations


def test_the_dense_network_of_a_lottery_has_no_patience(tiny):
    network = replace(FC, iterations=40, lr=3e-2)
    patient = Profile("patient", patience=0.1, evaluate_every=2)
    found = list(lottery(Run(network=network, profile=patient, seed=0), 1, tiny))
    assert found[0].row["iterations"] == 40 > found[1].row["iterations"]
    assert found[1].row["iterations"] == found[1].row["early_stop_iteration"] + 4


def test_patience_and_rounds_apart_are_those_of_tickets():
    ticket, dense = run_in("coarse", "fc", 0), run_in("coarse", "fc", 0, criterion=DENSE)
    assert (ticket.patience, ticket.stride, ticket.iterations) == (5_038, 4, 50_380)
    assert (dense.patience, dense.stride) == (None, 1)
    assert rounds_of(ticket, 20) == {0, 4, 8, 12, 16, 20}
    masks = run_in("coarse", "fc", 0, schedule="one_shot", trained=False)
    assert rounds_of(masks, 3) == {0, 1, 2, 3}
    assert run_in("patience", "fc", 0).patience == 5_038
    assert rounds_of(run_in("patience", "fc", 0), 3) == {0, 1, 2, 3}


def test_seeds_are_the_profiles_unless_more_are_named():
    supermasks = studies.find("supermasks")
    assert [studies.seeds_asked(supermasks, name) for name in ("paper", "coarse")] == [5, 3]
    assert studies.seeds_asked(studies.find("permutation"), "coarse") == 2


# the whole way


def test_a_coarse_study_of_a_conv_net(tmp_path, tiny, small):
    store = Store(tmp_path)
    ticket = run_in("coarse", "conv2", 0)
    masks = run_in("coarse", "conv2", 0, schedule="one_shot", trained=False)
    do(store, [ticket.dense], 0, tiny)
    assert set(studies.snapshots(ticket.dense)) <= set(store.metadata(ticket.dense.id)["at"])
    do(store, [ticket], 4, tiny)
    do(store, [ticket], 8, tiny)  # goes on
    do(store, [masks], 3, tiny)
    rows = {(row["run_id"], row["round"]): row for row in store.rows()}
    assert Counter(run for run, _ in rows) == {ticket.dense.id: 1, ticket.id: 3, masks.id: 4}
    sizes = {name: w.numel() for name, w in build(SMALL, 0).named_parameters() if w.dim() > 1}
    for number in (4, 8):
        row = rows[ticket.id, number]
        shares = {n: SMALL.keep["conv" if "conv" in n else "hidden"] for n in sizes}
        shares["output.weight"] = Fraction("0.9")
        exact = sum(size * shares[name] ** number for name, size in sizes.items())
        assert abs(row["kept"] - exact) <= len(sizes)
        assert row["iterations"] in (24, row["early_stop_iteration"] + 4)
        assert row["products"] == ["dense"] * 5
        assert {name: row[name] for name in COARSE} == COARSE
    assert rows[ticket.id, 0]["iterations"] == 24

    whole = Store(tmp_path / "whole")
    do(whole, [ticket.dense], 0, tiny)
    do(whole, [ticket], 8, tiny)
    assert whole.rows() == [row for row in store.rows() if row["run_id"] != masks.id]


def test_curves_lie_beside_the_rows(tmp_path, tiny, small):
    store = Store(tmp_path)
    ticket = run_in("coarse", "conv2", 0)
    masks = run_in("coarse", "conv2", 0, schedule="one_shot", trained=False)
    do(store, [ticket.dense], 0, tiny)
    do(store, [ticket], 4, tiny)
    do(store, [masks], 3, tiny)
    curves = {(curve["run_id"], curve["round"]): curve for curve in store.curves()}
    assert set(curves) == {(ticket.dense.id, 0), (ticket.id, 4), (masks.id, 3)}
    for row in store.rows():
        curve = curves.get((row["run_id"], row["round"]))
        if curve is None or not row["trained"]:
            continue
        at = (row["early_stop_iteration"] - curve["first"]) // curve["every"]
        assert curve["loss"][at] == min(curve["loss"])
        assert curve["loss"][at] == pytest.approx(row["early_stop_validation_loss"], rel=1e-5)
        assert curve["accuracy"][at] == pytest.approx(row["early_stop_validation_accuracy"])
        assert curve["last"] == row["iterations"]
        assert len(curve["loss"]) == len(curve["accuracy"]) == 1 + row["iterations"] // 2
    assert curves[masks.id, 3]["of"] == "rounds"
    assert len(curves[masks.id, 3]["loss"]) == 4

    again = {**curves[ticket.id, 4], "loss": [0.0]}
    with store.claim([ticket.id]) as lease:
        store.add(lease, [], [], [curves[ticket.id, 4]])  # is there: nothing is added
        assert len(store.curves()) == 3
        with pytest.raises(OtherNumbers, match="round 4 is stored with other numbers"):
            store.add(lease, [], [], [again])


def test_deviations_name_what_the_profile_changes():
    text = " ".join(runs.PROFILES["coarse"].deviations)
    for word in ("rounds 4, 8, 12, 16 and 20", "a tenth", "bfloat16", "three seeds"):
        assert word in text


# a round in flight


class Killed(Exception):
    """Stands for a process that is killed."""


@pytest.mark.parametrize(("network", "number"), [("conv2", 0), ("conv2", 4), ("fc", 4)])
def test_a_killed_training_goes_on_to_the_same_bits(
    tmp_path, tiny, small, monkeypatch, network, number
):
    monkeypatch.setattr(checkpoints, "EVERY", 0.0)  # keep the state at each look
    monkeypatch.setitem(NETWORKS, "fc", replace(FC, iterations=24))
    run = run_in("coarse", network, 0, criterion="movement")
    begun = run.dense if number == 0 else run
    whole, store = Store(tmp_path / "whole"), Store(tmp_path / "store")
    for each in (whole, store)[: 2 if number else 1]:
        do(each, [run.dense], 0, tiny)
    do(whole, [begun], number, tiny)

    taken = []

    def killed_after(most):
        def minibatches(*args):
            taken.clear()
            for batch in batches_of(*args):
                if len(taken) == most:
                    raise Killed
                taken.append(batch)
                yield batch

        return minibatches

    batches_of = train.minibatches
    monkeypatch.setattr(train, "minibatches", killed_after(3))
    with pytest.raises(Killed):
        do(store, [begun], number, tiny)
    part = store.load(begun.id, part=True)
    assert part is not None
    assert part[1]["seen"][-1][0] == 2  # the last look before
    monkeypatch.setattr(train, "minibatches", killed_after(None))
    do(store, [begun], number, tiny)
    assert store.load(begun.id, part=True) is None
    assert rows_and_curves(store) == rows_and_curves(whole)
    row = next(row for row in store.rows() if row["round"] == number)
    assert len(taken) == row["iterations"] - 2
    tensors, again = store.load(begun.id)[0], whole.load(begun.id)[0]
    assert tensors.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in tensors.items())


def rows_and_curves(store: Store) -> list[dict]:
    return [*store.rows(), *store.curves()]


def test_the_state_of_another_round_or_machine_is_not_gone_on_with(tmp_path, tiny, any_arithmetic):
    run, store = run_in("coarse", "conv2", 0), Store(tmp_path)
    with store.claim([run.id]) as lease:
        said = []
        out = Recorder(store, lease, tiny, said.append)
        flight = checkpoints.InFlight(run, 4, out)
        assert not flight.is_due()  # it has just begun
        assert flight.load() is None
        flight.save({"weight.0": torch.ones(2)}, {"seen": [[1200, 0.5, 0.9]], "seconds": 1.0})
        assert flight.load() is not None
        assert said == [f"{run.id} round  4: goes on from iteration 1,200"]
        assert checkpoints.InFlight(run, 8, out).load() is None
        store.save(lease, run.id, {}, {"round": 4, "arithmetic": "another machine"}, part=True)
        assert flight.load() is None
        flight.end()
        assert store.load(run.id, part=True) is None


def test_chains_of_conv_nets_are_done_one_after_another(tmp_path):
    wanted = [run_in("coarse", "conv2", 0, mask1=action) for action in ("rewind", "reinit")]
    assert groups(wanted, 4, Store(tmp_path), 8, across_seeds=False)[1] == [(r,) for r in wanted]
