"""Mask-1 and mask-0 actions against their definitions, place by place."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor

import lottery_sparse as ls
from lottery_sparse.pruning.actions import Mask0

SHAPE = (30, 41)
STD = 0.25

# ---- mask-1: where kept weights restart --------------------------------------------------------


def start_and_mask() -> tuple[Tensor, Tensor]:
    w = ls.random.truncated_normal(SHAPE, STD, seed=1)
    mask = ls.random.uniform(SHAPE, seed=2) < 0.3
    return w, mask


def act(name: str, seed: int = 0, w=None, mask=None) -> tuple[Tensor, Tensor, Tensor]:
    """(where it started, mask, where the action restarts it)"""
    default = start_and_mask()
    w, mask = default[0] if w is None else w, default[1] if mask is None else mask
    before = w.clone()
    started = ls.pruning.MASK1_ACTIONS[name](w, mask, STD, seed)
    assert torch.equal(w, before), "the argument stays what it was"
    assert started.shape == w.shape
    assert started.dtype == w.dtype
    assert started.data_ptr() != w.data_ptr()
    return w, mask, started


def multiset(values: Tensor) -> Tensor:
    return values.flatten().sort().values


SIGNED = [name for name in ls.pruning.MASK1_ACTIONS if name.startswith("signed_")]
RANDOM = [n for n in ls.pruning.MASK1_ACTIONS if any(w in n for w in ("reinit", "reshuffle"))] + [
    "constant",
    "constant_rescaling",
]


def test_names_are_the_papers():
    assert set(ls.pruning.MASK1_ACTIONS) == {
        "rewind", "reinit", "signed_reinit", "reinit_permute", "signed_reinit_permute",
        "reshuffle", "signed_reshuffle", "constant", "signed_constant", "reinit_rescaling",
        "signed_reinit_rescaling", "constant_rescaling", "signed_constant_rescaling", "mask_init",
    }  # fmt: skip
    assert all(inspect.getdoc(action) for action in ls.pruning.MASK1_ACTIONS.values())


def test_rewind():
    w, _, started = act("rewind")
    assert torch.equal(started, w)


@pytest.mark.parametrize("name", SIGNED)
def test_signed_actions_keep_every_sign(name):
    w, mask, started = act(name)
    assert torch.equal(started[mask].sign(), w[mask].sign())


@pytest.mark.parametrize(
    "name", ["reinit", "reinit_permute", "reshuffle", "constant", "reinit_rescaling"]
)
def test_unsigned_actions_keep_about_half_of_the_signs(name):
    w, mask, started = act(name)
    assert 0.4 < (started[mask].sign() == w[mask].sign()).double().mean() < 0.6


@pytest.mark.parametrize("name", RANDOM)
def test_random_actions_are_seeded(name):
    _, mask, started = act(name)
    assert torch.equal(started, act(name)[2])
    assert (started != act(name, seed=1)[2])[mask].any()


@pytest.mark.parametrize("name", ["reinit", "signed_reinit"])
def test_reinit_draws_from_the_init_law(name):
    w, _, started = act(name)
    drawn = ls.random.Stream(0).truncated_normal(SHAPE, STD)  # of the layer's std, not of w's
    assert torch.equal(started.abs(), drawn.abs())
    assert abs(started.std(correction=0) / STD - 1) < 0.05
    assert started.abs().max() <= 2.2738 * STD
    assert not torch.isin(started.abs(), w.abs()).all(), "new values, not the old ones"


@pytest.mark.parametrize("name", ["reinit_permute", "signed_reinit_permute"])
def test_permuting_moves_all_values_of_the_layer(name):
    w, mask, started = act(name)
    assert torch.equal(multiset(started.abs()), multiset(w.abs()))
    assert not torch.equal(multiset(started[mask].abs()), multiset(w[mask].abs()))
    if name == "reinit_permute":
        assert torch.equal(multiset(started), multiset(w))


@pytest.mark.parametrize("name", ["reshuffle", "signed_reshuffle"])
def test_reshuffling_moves_kept_values_among_kept_places(name):
    w, mask, started = act(name)
    assert torch.equal(multiset(started[mask].abs()), multiset(w[mask].abs()))
    assert (started[mask].abs() != w[mask].abs()).double().mean() > 0.9
    assert torch.equal(started[~mask], w[~mask])
    if name == "reshuffle":
        assert torch.equal(multiset(started[mask]), multiset(w[mask]))


def test_constants():
    w, _, started = act("signed_constant")
    assert torch.equal(started, w.sign() * STD)
    _, _, shuffled = act("constant")
    assert torch.equal(multiset(shuffled), multiset(w.sign() * STD))


@pytest.mark.parametrize("name", ["reinit", "signed_reinit", "constant", "signed_constant"])
def test_rescaling_divides_by_the_density(name):
    _, mask, started = act(name)
    _, _, rescaled = act(f"{name}_rescaling")
    assert torch.equal(rescaled, started * (mask.numel() / int(mask.sum())))


def test_rescaling_an_empty_layer_is_finite():
    _, _, started = act("signed_constant_rescaling", mask=torch.zeros(SHAPE, dtype=torch.bool))
    assert torch.isfinite(started).all()


def test_mask_init():
    w, mask, started = act("mask_init")
    assert torch.equal(started, torch.where(mask, w, 0))


@pytest.mark.parametrize("name", ls.pruning.MASK1_ACTIONS)
def test_other_dtypes_and_shapes(name):
    w = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    act(name, w=w, mask=w > 0)
    act(name, w=w.half(), mask=w > 0)
    act(name, w=w.permute(3, 0, 1, 2), mask=(w > 0).permute(3, 0, 1, 2))
    act(name, w=w, mask=torch.zeros_like(w, dtype=torch.bool))


# ---- mask-0: what pruned weights hold ----------------------------------------------------------

# one weight per case:        grew, shrank, equal size, grew, shrank, shrank; pruned earlier
W_INIT = torch.tensor([[1.0, -2.0, 3.0, 1.0, 2.0, -2.0, 0.7]])
W_FINAL = torch.tensor([[-2.0, 1.0, -3.0, 4.0, 1.0, -1.0, 0.7]])
MASK = torch.tensor([[False, False, False, True, True, False, False]])
BEFORE = torch.tensor([[True, True, True, True, True, True, False]])
HELD = torch.tensor([[0.0, 0, 0, 0, 0, 0, 0.7]])  # what earlier rounds froze


def freeze(name: str, held: Tensor | None = HELD, seed: int = 0) -> Mask0:
    decision = ls.pruning.MASK0_ACTIONS[name](W_INIT, W_FINAL, MASK, BEFORE, held, seed)
    assert isinstance(decision, Mask0)
    return decision


def test_mask0_names_are_the_papers():
    assert set(ls.pruning.MASK0_ACTIONS) == {
        "zero", "freeze_init", "freeze_init_zero_mask", "freeze_init_zero_all",
        "freeze_init_zero_reshuffle", "freeze_init_zero_rev", "freeze_reinit", "original",
    }  # fmt: skip
    assert all(inspect.getdoc(action) for action in ls.pruning.MASK0_ACTIONS.values())


@pytest.mark.parametrize(
    ("name", "frozen"),
    [
        # kept weights hold 0 here, that of an earlier round keeps its 0.7
        ("freeze_init", [1.0, -2.0, 3.0, 0, 0, -2.0, 0.7]),
        ("freeze_init_zero_mask", [1.0, 0, 3.0, 0, 0, 0, 0.7]),  # strict: equal size stays
        ("freeze_init_zero_all", [1.0, 0, 3.0, 0, 0, 0, 0.7]),
        ("freeze_init_zero_rev", [0, -2.0, 3.0, 0, 0, -2.0, 0.7]),
    ],
)
def test_frozen_values(name, frozen):
    assert freeze(name).frozen.tolist() == [[pytest.approx(v) for v in frozen]]
    assert freeze(name, held=None).frozen.tolist()[0][-1] == 0, "nothing was frozen before: zero"


def test_zero_and_original():
    assert freeze("zero") == (None, None, False)
    assert freeze("original") == (None, None, True)
    for name in set(ls.pruning.MASK0_ACTIONS) - {"original"}:
        assert not freeze(name).released


def test_variant_2_alone_starts_kept_weights_at_zero():
    assert freeze("freeze_init_zero_all").start_at_zero.tolist() == [
        [False, False, False, False, True, False, False]
    ]
    for name in set(ls.pruning.MASK0_ACTIONS) - {"freeze_init_zero_all"}:
        assert freeze(name).start_at_zero is None


def test_variant_2_accumulates():
    """A weight that starts at 0 can only have grown: it starts at 0 for good."""
    w_init = torch.tensor([2.0, 1.0, 2.0])
    everything = torch.ones(3, dtype=torch.bool)
    action = ls.pruning.MASK0_ACTIONS["freeze_init_zero_all"]
    first = action(w_init, torch.tensor([1.0, 2.0, 3.0]), everything, everything, None)
    assert first.start_at_zero.tolist() == [True, False, False]
    start = w_init.masked_fill(first.start_at_zero, 0)
    second = action(start, torch.tensor([5.0, 0.5, 3.0]), everything, everything, first.frozen)
    assert second.start_at_zero.tolist() == [True, True, False]
    # pruned now, a weight that started at 0 holds 0
    pruned = torch.tensor([False, True, True])
    third = action(start, torch.tensor([5.0, 2.0, 3.0]), pruned, everything, first.frozen)
    assert third.frozen.tolist() == [0, 0, 0]


def test_reshuffled_zeros_are_as_many_and_elsewhere():
    w_init, w_final = torch.randn(2, 500)
    before = torch.rand(500) < 0.8
    mask = before & (torch.rand(500) < 0.4)
    held = torch.where(before, 0.0, 9.0)
    arguments = (w_init, w_final, mask, before, held)
    variant_1 = ls.pruning.MASK0_ACTIONS["freeze_init_zero_mask"](*arguments).frozen
    control = ls.pruning.MASK0_ACTIONS["freeze_init_zero_reshuffle"](*arguments, 0).frozen
    now = before & ~mask
    assert (control[now] == 0).sum() == (variant_1[now] == 0).sum()
    assert (control[now] == 0).ne(variant_1[now] == 0).any()
    assert ((control == 0) | (control == w_init))[now].all()
    assert (control[~before] == 9).all(), "places are among those pruned now"
    assert (control[mask] == 0).all()
    other = ls.pruning.MASK0_ACTIONS["freeze_init_zero_reshuffle"](*arguments, 1).frozen
    assert (control != other).any()


def test_freeze_reinit_draws_anew():
    w_init = torch.randn(40, 50) * 0.3
    everything = torch.ones(40, 50, dtype=torch.bool)
    action = ls.pruning.MASK0_ACTIONS["freeze_reinit"]
    frozen = action(w_init, w_init, ~everything, everything, None, 5).frozen
    assert abs(frozen.std() / w_init.std() - 1) < 0.05
    assert not torch.isin(frozen, w_init).any()
    assert torch.equal(frozen, action(w_init, w_init, ~everything, everything, None, 5).frozen)
    kept = action(w_init, w_init, everything, everything, None, 5).frozen
    assert (kept == 0).all()


@pytest.mark.parametrize("name", sorted(set(ls.pruning.MASK0_ACTIONS) - {"zero", "original"}))
def test_frozen_values_stay_for_good(name):
    """Three rounds: what a round froze is what later rounds hold."""
    w_init = torch.randn(300)
    previous = mask = torch.ones(300, dtype=torch.bool)
    frozen, history = None, []
    for r in range(3):
        previous, mask = mask, mask & (torch.rand(300) < 0.6)
        w_final = torch.where(previous, torch.randn(300), w_init)
        frozen = ls.pruning.MASK0_ACTIONS[name](w_init, w_final, mask, previous, frozen, r).frozen
        history.append((~mask, frozen))
        for pruned, then in history:
            assert torch.equal(frozen[pruned], then[pruned])
