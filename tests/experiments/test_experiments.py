"""The experiments: initial weights, the training loop, the lottery loop, and the command line."""

import json
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from tolerances import close

import lottery_sparse as ls
from experiments.__main__ import main
from experiments.study.networks import CONV2, CONV4, CONV6, FC, NETWORKS, build, keep_by_parameter
from experiments.study.runs import Profile, Run
from experiments.tools import quickstart
from experiments.train import data
from experiments.train import loop as train
from experiments.train.lottery import lottery, untrained
from experiments.train.models import dense_start, model_of, weights_of
from lottery_sparse.ops import dispatch


@pytest.fixture(scope="module")
def mini() -> data.Dataset:
    return data.load("mnist-mini")


@pytest.fixture(scope="module")
def tiny(mini) -> data.Dataset:
    """A few hundred of the digits, so that an evaluation takes a millisecond."""

    def first(part: data.Split, count: int) -> data.Split:
        return data.Split(part.images[:count], part.labels[:count])

    return replace(
        mini, train=first(mini.train, 600), val=first(mini.val, 100), test=first(mini.test, 100)
    )


SHORT = replace(FC, iterations=12)


def short(**changes) -> Run:
    return Run(**{"network": SHORT, "profile": "paper", "seed": 0, **changes})


# networks


@pytest.mark.parametrize(
    ("network", "weights", "biases"),
    [
        (FC, 266_200, 410),
        (CONV2, 4_300_992, 650),
        (CONV4, 2_425_024, 906),
        (CONV6, 2_261_184, 1_418),
    ],
    ids=NETWORKS,
)
def test_networks_have_the_parameters_of_the_paper(network, weights, biases):
    model = build(network, seed=0)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert sum(n for name, n in sizes.items() if name.endswith("weight")) == weights
    assert sum(n for name, n in sizes.items() if name.endswith("bias")) == biases
    assert model(torch.rand(2, *network.input_shape)).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "fan_in", "fan_out"),
    [
        ("conv1", 9 * 3, 9 * 64),
        ("conv4", 9 * 128, 9 * 128),
        ("conv6", 9 * 256, 9 * 256),
        ("fc1", 4 * 4 * 256, 256),
        ("output", 256, 10),
    ],
)
def test_weights_start_from_a_truncated_glorot_normal(name, fan_in, fan_out):
    weight = build(CONV6, seed=1).get_submodule(name).weight.detach()
    std = (2 / (fan_in + fan_out)) ** 0.5
    assert weight.std().item() == pytest.approx(std, rel=3 / weight.numel() ** 0.5)
    assert abs(weight.mean().item()) < 4 * std / weight.numel() ** 0.5
    assert 2.2 * std < weight.abs().max() <= 2.2738 * std  # cut at two sigma of a wider normal


def test_biases_start_at_zero():
    assert all(not p.any() for name, p in build(CONV2, 0).named_parameters() if "bias" in name)


def test_weights_come_back_from_the_seed_and_leave_global_state_alone():
    state = torch.get_rng_state()
    first = build(FC, seed=7)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(99)
    again = build(FC, seed=7)
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.fc1.weight, build(FC, seed=8).fc1.weight)


def test_shares_kept_are_exact_and_by_layer_kind():
    assert keep_by_parameter(FC) == {
        "fc1.weight": Fraction(4, 5),
        "fc2.weight": Fraction(4, 5),
        "output.weight": Fraction(9, 10),
    }
    shares = keep_by_parameter(CONV6, rounds=2)
    assert shares["conv6.weight"] == Fraction(289, 400)
    assert shares["fc1.weight"] == Fraction(16, 25)
    assert shares["output.weight"] == Fraction(81, 100)


# training


def fit(model, dataset, **changes) -> train.Result:
    settings = {"iterations": 30, "lr": 1.2e-3, "batch_size": 60, "seed": 0, "evaluate_every": 10}
    return train.train(model, dataset, **{**settings, **changes})


def test_training_learns(mini):
    result = fit(build(FC, 0), mini, iterations=150, evaluate_every=50)
    assert result.test_accuracy > 0.85
    assert [e.iteration for e in result.evaluations] == [0, 50, 100, 150]


def test_last_iteration_is_always_evaluated(tiny):
    result = fit(build(FC, 0), tiny, iterations=25)
    assert [e.iteration for e in result.evaluations] == [0, 10, 20, 25]


def test_test_accuracy_is_that_of_the_lowest_validation_loss(tiny):
    # overfits 600 images, so the lowest loss is not the last one
    result = fit(build(FC, 0), tiny, iterations=400, evaluate_every=10)
    losses = {e.iteration: e.validation_loss for e in result.evaluations}
    assert result.early_stop_iteration == min(losses, key=losses.get) < 400
    shorter = fit(build(FC, 0), tiny, iterations=result.early_stop_iteration)
    assert shorter.final_test_accuracy == result.test_accuracy


def test_training_leaves_the_final_weights(tiny):
    model = build(FC, 0)
    result = fit(model, tiny, iterations=400)
    assert result.early_stop_iteration < 400
    assert train.evaluation(model, tiny.test)[1] == result.final_test_accuracy
    assert train.evaluation(model, tiny.val)[0] == result.final_validation_loss
    assert train.evaluation(model, tiny.train)[1] == result.final_train_accuracy


def test_divergence_is_an_error_with_a_way_out(tiny):
    with pytest.raises(ValueError, match=r"validation loss is .* lr 1e\+30 .*give a lower one"):
        fit(build(FC, 0), tiny, lr=1e30)


# the lottery loop


def test_batches_are_the_same_in_every_round(tiny, monkeypatch):
    seen = []
    stepper = train.stepper

    def watched(model, optimizer):
        engine, step = stepper(model, optimizer)

        def and_seen(images, labels):
            seen.append(labels.tolist())
            return step(images, labels)

        return engine, and_seen

    monkeypatch.setattr(train, "stepper", watched)
    list(lottery(short(), 2, tiny))  # 12 iterations: more than one epoch of 10
    assert len(seen) == 36
    assert seen[:12] == seen[12:24] == seen[24:]
    assert seen[0] != seen[10]


def test_rows_name_the_engine(tiny, monkeypatch):
    one_call = "train_step" if ls.ops.dispatch.built("cpu") else "modules"
    run = short(mask0="freeze_init")
    assert [this.row["engine"] for this in lottery(run, 1, tiny)] == [one_call] * 2
    model = build(CONV2, 0)
    assert train.stepper(model, train.adam(model.parameters(), 1e-3))[0] == "modules"
    monkeypatch.setattr(dispatch, "forced", lambda: "reference")
    assert [this.row["engine"] for this in lottery(run, 1, tiny)] == ["modules"] * 2


def test_counts_kept_are_exact(tiny):
    rounds = list(lottery(short(), 2, tiny))
    kept = [[int(mask.sum()) for mask in this.start.masks.values()] for this in rounds]
    assert kept == [[235_200, 30_000, 1_000], [188_160, 24_000, 900], [150_528, 19_200, 810]]
    assert [this.row["density"] for this in rounds] == [sum(k) / 266_200 for k in kept]


@pytest.mark.parametrize(
    ("criterion", "mask1", "mask0"),
    [
        ("large_final", "rewind", "zero"),
        ("magnitude_increase", "signed_constant", "freeze_init"),
        ("large_final_same_sign", "reinit", "freeze_init_zero_mask"),
        ("random", "signed_reshuffle", "freeze_init_zero_all"),
        ("movement", "mask_init", "original"),
    ],
)
def test_runs_repeat_exactly_and_pruned_weights_hold(criterion, mask1, mask0, tiny):
    run = short(criterion=criterion, mask1=mask1, mask0=mask0)
    rounds = list(lottery(run, 2, tiny))
    for this, again in zip(rounds, lottery(run, 2, tiny), strict=True):
        assert this.row == again.row
        for name, weight in this.w_final.items():
            assert torch.equal(weight, again.w_final[name])
    last = rounds[-1]
    for name, mask in last.start.masks.items():
        assert (last.w_final[name] != last.start.weights[name])[mask].any()
        held = last.start.frozen.get(name, torch.zeros_like(last.w_final[name]))
        moved = last.w_final[name] != held
        assert moved[~mask].any() == (mask0 == "original")
        assert not (mask & ~rounds[1].start.masks[name]).any()  # what is pruned stays pruned


def test_biases_are_rewound_and_never_masked(tiny):
    *_, last = lottery(short(), 1, tiny)
    assert set(last.start.masks) == {"fc1.weight", "fc2.weight", "output.weight"}
    assert not last.start.weights["fc1.bias"].any()
    assert last.w_final["fc1.bias"].any()


def test_late_rewinding_starts_from_the_dense_run_at_that_iteration(tiny):
    _, first = lottery(short(rewind_to=5), 1, tiny)
    model = build(FC, 0)
    fit(model, tiny, iterations=5)
    for name, weight in weights_of(model).items():
        assert torch.equal(first.start.weights[name], weight)


def test_compounding_acts_on_the_last_start(tiny):
    plain = list(lottery(short(mask1="reinit_permute"), 2, tiny))
    compound = list(lottery(short(mask1="reinit_permute", compounding=True), 2, tiny))
    starts = [[this.start.weights["fc1.weight"] for this in rounds] for rounds in (plain, compound)]
    assert torch.equal(starts[0][1], starts[1][1])  # the first round has nothing to compound
    assert not torch.equal(starts[0][2], starts[1][2])


def test_variant_2_starts_accumulate(tiny):
    dense, first, second = lottery(short(mask0="freeze_init_zero_all"), 2, tiny)
    name = "fc1.weight"
    kept = first.start.masks[name]
    toward_zero = dense.w_final[name].abs() < dense.start.weights[name].abs()
    assert torch.equal(first.start.weights[name][kept] == 0, toward_zero[kept])
    still = second.start.masks[name]
    zero_before = first.start.weights[name][still] == 0
    zero_now = second.start.weights[name][still] == 0
    assert zero_now[zero_before].all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"criterion": "largest"}, "criterion must be one of large_final, .*got 'largest'"),
        ({"mask1": "keep"}, "mask1 must be one of rewind, "),
        ({"mask0": "one"}, "mask0 must be one of zero, "),
        ({"rewind_to": 13}, "0 to 12; got 13"),
    ],
)
def test_a_run_refuses_what_it_cannot_do(change, message):
    with pytest.raises(ValueError, match=message):
        short(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
        ({"keep": {"hidden": Fraction(3, 2)}}, r"in \[0, 1\], got 3/2"),
    ],
)
def test_a_network_refuses_a_protocol_that_is_none(change, message):
    with pytest.raises(ValueError, match=message):
        replace(FC, **change)


@pytest.mark.parametrize("change", [{"evaluate_every": 0}, {"stride": 0}, {"patience": 0}])
def test_a_profile_refuses_steps_of_nothing(change):
    with pytest.raises(ValueError, match="must be at least 1 and patience above 0"):
        Profile("none", **change)


def test_untrained_accuracies(mini):
    network = replace(FC, iterations=200)
    (dense,) = lottery(short(network=network), 0, mini)
    curves = [
        ("large_final_same_sign", "init"),
        ("large_final_same_sign", "signed_constant"),
        ("random", "init"),
    ]
    points = list(untrained(network, mini, 0, dense.w_final, curves, rounds=(4,)))
    accuracy = {(p.criterion, p.weights): p.row["test_accuracy"] for p in points}
    assert {p.row["density"] for p in points} == {(96_338 + 12_288 + 656) / 266_200}
    assert accuracy["large_final_same_sign", "init"] > 0.5
    assert accuracy["large_final_same_sign", "signed_constant"] > 0.5
    assert accuracy["random", "init"] < 0.3


def test_a_masked_model_computes_with_the_kept_weights_only(tiny):
    _, first = lottery(short(), 1, tiny)
    model = model_of(SHORT, first.start, "cpu")
    plain = build(SHORT, 0)
    with torch.no_grad():
        for name, mask in first.start.masks.items():
            plain.get_parameter(name).mul_(mask)
    close(model(tiny.test.images), plain(tiny.test.images))


# the command line


@pytest.fixture
def brief(monkeypatch):
    monkeypatch.setattr(quickstart, "ROUNDS", 2)
    monkeypatch.setattr(quickstart, "SUPERMASK_ROUNDS", (2, 8))
    monkeypatch.setattr(quickstart, "REPEATS", 1)
    monkeypatch.delenv("LS_DATA_DIR", raising=False)


def test_quickstart_writes_numbers_and_figure(brief, tmp_path, capsys):
    numbers, figure = tmp_path / "new" / "numbers.json", tmp_path / "figure.png"
    assert (
        main(["quickstart", "--iterations", "5", "--json", f"{numbers}", "--png", f"{figure}"]) == 0
    )
    said = capsys.readouterr().out
    assert "mnist-mini subset" in said
    found = json.loads(numbers.read_text())
    assert found["dataset"] == "mnist-mini"
    assert found["dense"]["density"] == 1
    points = [found["dense"], *found["ticket"], *found["reinit"], *found["random"]]
    for curve in found["supermask"].values():
        points += curve
    assert {"init", "random", "large_final", "large_final_same_sign"} < set(found["supermask"])
    assert "large_final_same_sign_signed_constant" in found["supermask"]
    assert all(0 <= p["accuracy"] <= 1 and 0 < p["density"] <= 1 for p in points)
    densities = [p["density"] for p in found["ticket"]]
    assert densities == [p["density"] for p in found["random"]]
    assert densities == [p["density"] for p in found["reinit"]]
    assert densities[0] == pytest.approx(0.5008, abs=1e-4)
    assert [row["layer"] for row in found["timings"]["layers"]] == ["fc1", "fc2", "output"]
    assert found["timings"]["step"]["dense_ms"] > 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figure.png", "new"]


def test_quickstart_prints_without_matplotlib(brief, tmp_path, capsys, monkeypatch):
    find_spec = ls.ops.dispatch.importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name: None if name == "matplotlib" else find_spec(name),
    )
    assert main(["quickstart", "--iterations", "1", "--png", f"{tmp_path / 'figure.png'}"]) == 0
    assert "pip install 'lottery-sparse[experiments]'" in capsys.readouterr().out
    assert not (tmp_path / "figure.png").exists()


def test_list_names_everything(capsys):
    assert main(["list"]) == 0
    said = capsys.readouterr().out
    for name in (
        *NETWORKS,
        *data.DATASETS,
        *ls.pruning.CRITERIA,
        *ls.pruning.MASK1_ACTIONS,
        *ls.pruning.MASK0_ACTIONS,
    ):
        assert name in said


def test_dense_start_masks_nothing():
    start = dense_start(FC, 0, "cpu")
    assert start.released
    assert start.masks.density == 1
