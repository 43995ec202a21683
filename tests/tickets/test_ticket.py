"""find_ticket: the order of things in the loop, what each training starts from, and Ticket."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lottery_sparse as ls
from lottery_sparse.pruning.prune import keep_count


class Trainer:
    """A deterministic train_fn that notes what each training started from and ended with."""

    def __init__(self, steps: int = 3):
        self.steps = steps
        self.starts: list[dict[str, torch.Tensor]] = []
        self.finals: list[dict[str, torch.Tensor]] = []
        self.masks: list[ls.Masks] = []
        self.stops: list[int | None] = []

    def __call__(self, model, stop_at=None):
        self.stops.append(stop_at)
        self.masks.append(ls.masks_of(model))
        self.starts.append(copy_of(ls.dense_state_dict(model)))
        generator = torch.Generator().manual_seed(0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9, weight_decay=0.01)
        model.train()
        for _ in range(self.steps if stop_at is None else stop_at):
            x = torch.randn(16, 6, generator=generator)
            optimizer.zero_grad()
            model(x).sub(x[:, :4].sin() + 2).square().mean().backward()
            optimizer.step()
        self.finals.append(copy_of(ls.dense_state_dict(model)))
        return {"training": len(self.stops)}


def copy_of(state):
    return {name: value.clone() for name, value in state.items()}


def network():
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))


WEIGHTS = {"0.weight": 48, "3.weight": 32}


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# ---- the loop ----------------------------------------------------------------------------------


def test_iterative_pruning_with_rewinding():
    model, train = network(), Trainer()
    init = copy_of(model.state_dict())
    ticket = ls.find_ticket(model, train, rounds=3, keep={"0.weight": 0.8, "3.weight": 0.9})

    assert train.stops == [None] * 4, "the dense training, and one after each pruning"
    same(train.starts[0], init)
    counts = dict(WEIGHTS)
    masks = train.masks[0]
    assert masks.density == 1
    for r in range(1, 4):
        counts = {n: keep_count(counts[n], {"0.weight": 0.8, "3.weight": 0.9}[n]) for n in counts}
        expected = ls.prune(
            train.starts[r - 1], train.finals[r - 1], masks, "large_final",
            {"0.weight": 0.8, "3.weight": 0.9}, generator=ls.random.derive(0, "prune", r),
        )  # fmt: skip
        masks = train.masks[r]
        assert masks == expected
        assert {n: int(m.sum()) for n, m in masks.items()} == counts
        rewound = {n: v * masks[n] if n in masks else v for n, v in init.items()}
        same(train.starts[r], rewound)  # biases and BatchNorm's buffers too
        for name in WEIGHTS:
            assert (train.finals[r][name][~masks[name]] == 0).all()
    assert ticket.masks == masks
    same(ticket.start, train.starts[-1])
    same(ls.dense_state_dict(model), train.finals[-1])
    assert ticket.frozen == {}
    assert not ticket.released
    assert [h["round"] for h in ticket.history] == [0, 1, 2, 3]
    assert [h["metrics"]["training"] for h in ticket.history] == [1, 2, 3, 4]
    assert [h["density"] for h in ticket.history] == [m.density for m in train.masks]


def test_training_moves_what_rewinding_must_restore():
    train = Trainer()
    ls.find_ticket(network(), train, rounds=1, keep=0.5)
    for name in ("0.bias", "1.weight", "1.running_mean", "1.num_batches_tracked"):
        assert not torch.equal(train.finals[0][name], train.starts[0][name])
        assert torch.equal(train.starts[1][name], train.starts[0][name])


def test_one_shot():
    train = Trainer()
    ticket = ls.find_ticket(network(), train, rounds=1, keep="0.512")
    assert len(train.stops) == 2
    assert {n: int(m.sum()) for n, m in ticket.masks.items()} == {"0.weight": 25, "3.weight": 16}


def test_late_rewinding():
    train, fresh = Trainer(), Trainer()
    model = network()
    init = copy_of(model.state_dict())
    ticket = ls.find_ticket(model, train, rounds=2, keep=0.7, rewind_to=2)
    assert train.stops == [2, None, None, None]
    fresh(ls.sparsify_(network()), stop_at=2)
    late = fresh.finals[0]
    same(train.starts[1], init)  # the dense run starts over
    for start, masks in zip(train.starts[2:], train.masks[2:], strict=True):
        same(start, {n: v * masks[n] if n in masks else v for n, v in late.items()})
    assert ticket.masks == train.masks[-1]


def test_it_repeats_and_the_seed_counts():
    def run(**changes):
        return ls.find_ticket(
            network(), Trainer(), 2, 0.6, "random", mask1="reinit", mask0="freeze_reinit", **changes
        )

    one, two = run(generator=5), run(generator=5)
    assert one.masks == two.masks
    same(one.start, two.start)
    assert one.masks != run(generator=6).masks
    seeded = [run(generator=torch.Generator().manual_seed(1)).masks for _ in range(2)]
    assert seeded[0] == seeded[1]


def test_global_scope_and_functions_of_ones_own():
    train = Trainer()
    ticket = ls.find_ticket(
        network(), train, 1, 0.5,
        criterion=lambda w_init, w_final, generator: w_final,
        mask1=lambda w_start, mask, std, generator: w_start * 2,
        mask0=lambda w_init, w_final, mask, before, held, generator: ls.pruning.MASK0_ACTIONS[
            "freeze_init"
        ](w_init, w_final, mask, before, held),
        scope="global",
    )  # fmt: skip
    assert ticket.masks.kept == 40
    final = torch.cat([train.finals[0][n].flatten() for n in WEIGHTS])
    kept = torch.cat([ticket.masks[n].flatten() for n in WEIGHTS])
    assert final[kept].min() > final[~kept].max()
    for name in WEIGHTS:
        init, mask = train.starts[0][name], ticket.masks[name]
        assert torch.equal(train.starts[1][name], torch.where(mask, init * 2, init))


# ---- actions in the loop -----------------------------------------------------------------------


def stds_of(init):
    return {n: float(init[n].double().std(correction=0)) for n in WEIGHTS}


@pytest.mark.parametrize("mask1", ls.pruning.MASK1_ACTIONS)
def test_every_mask1_action_starts_from_the_dense_init(mask1):
    train = Trainer()
    ls.find_ticket(network(), train, rounds=2, keep=0.6, mask1=mask1, generator=9)
    init = train.starts[0]
    for r in (1, 2):
        for name in WEIGHTS:
            mask = train.masks[r][name]
            stream = ls.random.Stream(ls.random.derive(9, "mask-1", r), name)
            kept = ls.pruning.MASK1_ACTIONS[mask1](init[name], mask, stds_of(init)[name], stream)
            assert torch.equal(train.starts[r][name], torch.where(mask, kept, 0))


def test_compounding_acts_on_what_the_last_round_was_given():
    train = Trainer()
    ls.find_ticket(
        network(), train, rounds=2, keep=0.6, mask1="reinit_permute", compounding=True, generator=9
    )
    given = {name: train.starts[0][name] for name in WEIGHTS}
    for r in (1, 2):
        for name in WEIGHTS:
            mask = train.masks[r][name]
            stream = ls.random.Stream(ls.random.derive(9, "mask-1", r), name)
            given[name] = ls.pruning.MASK1_ACTIONS["reinit_permute"](given[name], mask, 0.0, stream)
            assert torch.equal(train.starts[r][name], torch.where(mask, given[name], 0))
            assert (train.starts[r][name][mask] != 0).all(), "zeros of pruned places stay there"


@pytest.mark.parametrize("mask0", sorted(set(ls.pruning.MASK0_ACTIONS) - {"original"}))
def test_every_mask0_action_holds(mask0):
    train = Trainer()
    ticket = ls.find_ticket(network(), train, 3, 0.6, "random", mask0=mask0, generator=9)
    for name in WEIGHTS:
        frozen = None
        for r in (1, 2, 3):
            before, mask = train.masks[r - 1][name], train.masks[r][name]
            decision = ls.pruning.MASK0_ACTIONS[mask0](
                train.starts[r - 1][name], train.finals[r - 1][name], mask, before, frozen,
                ls.random.Stream(ls.random.derive(9, "mask-0", r), name),
            )  # fmt: skip
            frozen = decision.frozen
            held = torch.zeros_like(mask, dtype=torch.float32) if frozen is None else frozen
            for state in (train.starts[r], train.finals[r]):
                assert torch.equal(state[name][~mask], held[~mask])
            kept = train.starts[0][name]
            if decision.start_at_zero is not None:
                assert decision.start_at_zero.any()
                kept = kept.masked_fill(decision.start_at_zero, 0)
            assert torch.equal(train.starts[r][name][mask], kept[mask])
        if frozen is None:
            assert name not in ticket.frozen
        else:
            assert torch.equal(ticket.frozen[name], frozen)


@pytest.mark.parametrize(("mask1", "pruned_start"), [("mask_init", 0), ("rewind", 1)])
def test_original_trains_every_weight(mask1, pruned_start):
    train = Trainer()
    ticket = ls.find_ticket(network(), train, 2, 0.6, mask1=mask1, mask0="original")
    assert train.masks[-1].density == 1, "trained dense"
    assert ticket.masks.density == pytest.approx(0.36, abs=0.02), "the mask chosen all the same"
    assert ticket.released
    for name, mask in ticket.masks.items():
        pruned = ~mask
        expected = train.starts[0][name][pruned] * pruned_start
        assert torch.equal(train.starts[-1][name][pruned], expected)
        assert (train.finals[-1][name][pruned] != expected).any()
    same(ls.dense_state_dict(ticket.apply_(network())), train.starts[-1])


# ---- models of all kinds -----------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.out(self.b(self.a(x).tanh()))


@pytest.mark.parametrize("mask1", ["rewind", "signed_constant"])
def test_tied_weights(mask1):
    torch.manual_seed(1)
    model, train = Tied(), Trainer()
    ticket = ls.find_ticket(model, train, 2, 0.5, mask1=mask1, mask0="freeze_init")
    assert list(ticket.masks) == ["a.weight", "out.weight"], "one mask for both"
    for state in train.starts[2], train.finals[2], ticket.start:
        assert torch.equal(state["a.weight"], state["b.weight"])
    if mask1 == "signed_constant":
        kept = ticket.start["a.weight"][ticket.masks["a.weight"]].abs()
        assert kept.unique().numel() == 1
    again = ticket.apply_(Tied())
    assert again.a.weight is again.b.weight
    same(ls.dense_state_dict(again), ticket.start)
    assert torch.equal(again.a.weight_mask, again.b.weight_mask)


def test_masks_set_before_are_where_it_starts():
    model, train = ls.sparsify_(network(), lambda m, name: name == "0"), Trainer()
    half = torch.arange(48).view(8, 6) % 2
    ls.set_masks_(model, {"0.weight": half})
    ticket = ls.find_ticket(model, train, 1, 0.5, rewind_to=1)
    assert [int(m.kept) for m in train.masks] == [24, 24, 12]
    assert list(ticket.masks) == ["0.weight"], "layers left out of sparsify_ stay dense"
    assert not (ticket.masks["0.weight"] & (half == 0)).any()


class WithState(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 4)
        self.register_buffer("weight_mask", torch.ones(3))  # ours only by name
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.fc(x)

    def get_extra_state(self):
        return {"calls": self.calls}

    def set_extra_state(self, state):
        self.calls = state["calls"]


def test_extra_state_and_buffers_are_rewound():
    model = WithState()
    calls = []

    def train(model, stop_at=None):
        calls.append(model.calls)
        model(torch.randn(2, 6))

    ticket = ls.find_ticket(model, train, 2, 0.5)
    assert calls == [0, 0, 0]
    assert ticket.start["_extra_state"] == {"calls": 0}
    assert torch.equal(ticket.start["weight_mask"], torch.ones(3))


# ---- Ticket ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask0", ["zero", "freeze_init_zero_all"])
def test_apply_puts_the_ticket_into_a_new_model(mask0):
    train = Trainer()
    ticket = ls.find_ticket(network(), train, 2, 0.5, mask1="signed_reinit", mask0=mask0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    assert ticket.apply_(model) is model
    assert ls.masks_of(model) == ticket.masks
    same(ls.dense_state_dict(model), train.starts[-1])
    train(model)
    same(train.finals[-1], train.finals[-2])  # trains exactly as it did
    ticket.apply_(model)  # also into a masked, trained model
    same(ls.dense_state_dict(model), ticket.start)


def test_apply_masks_only_what_the_ticket_masks():
    model = ls.sparsify_(network(), lambda module, name: name == "3")
    ticket = ls.find_ticket(model, Trainer(), 1, 0.5)
    new = ticket.apply_(network())
    assert type(new[0]) is nn.Linear
    assert type(new[3]) is ls.nn.MaskedLinear


def test_the_ticket_is_its_own():
    """Training on does not change the ticket found."""
    model, train = network(), Trainer()
    ticket = ls.find_ticket(model, train, 1, 0.5, mask0="freeze_init")
    start, frozen = copy_of(ticket.start), copy_of(ticket.frozen)
    train(model)
    ls.set_masks_(model, {n: torch.eye(*m.shape) for n, m in ticket.masks.items()})
    same(ticket.start, start)
    same(ticket.frozen, frozen)
    assert ticket.masks.density == 0.5
