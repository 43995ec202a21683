"""prune: exact counts, monotone masks, layer-wise and global, and what it refuses."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lottery_sparse as ls
from lottery_sparse.pruning.prune import keep_count

# LeNet 300-100 on MNIST: the weights of its layers, and the share that each round keeps
FC = {"fc1.weight": (300, 784), "fc2.weight": (100, 300), "fc3.weight": (10, 100)}
FC_KEEP = {"fc1.weight": 0.8, "fc2.weight": 0.8, "fc3.weight": 0.9}
# kept share of all weights, in percent, by round (paper-facts, section 3)
FC_SCHEDULE = {
    1: 80.04, 2: 64.06, 3: 51.28, 4: 41.05, 5: 32.87, 6: 26.32, 7: 21.07, 8: 16.88, 10: 10.83,
    12: 6.95, 14: 4.47, 16: 2.87, 18: 1.85, 20: 1.19, 22: 0.77, 24: 0.50,
}  # fmt: skip


def normal(shapes, seed):
    rng = np.random.default_rng(seed)
    return {n: torch.from_numpy(rng.normal(size=s).astype(np.float32)) for n, s in shapes.items()}


def full(shapes):
    return {name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()}


SMALL = {"a": (6, 5), "b": (40,), "c": (2, 3, 3, 3)}


# ---- counts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kept", "keep", "expected"),
    [
        (235_200, 0.8, 188_160),  # (1 - 0.8) * 100 in floats would prune one too few
        (1_000, 0.9, 900),
        (10, 0.25, 3),  # 2.5: half up
        (10, 0.35, 4),  # 3.5: half up
        (3, 0.5, 2),
        (7, 0, 0),
        (7, 1, 7),
        (0, 0.8, 0),
        (1, 0.5, 1),
        (1, 0.49, 0),
        (10**18 + 1, "0.1", 10**17),
        (3, Fraction(2, 3), 2),
        (1000, Decimal("0.0005"), 1),
        (100, np.float32(0.8), 80),
        (100, np.float64(0.7), 70),
        (30, "2/3", 20),
        (1000, 1e-3, 1),
    ],
)
def test_keep_count(kept, keep, expected):
    assert keep_count(kept, keep) == expected


@given(kept=st.integers(0, 10**9), thousandths=st.integers(0, 1000))
def test_keep_count_rounds_half_up(kept, thousandths):
    assert keep_count(kept, thousandths / 1000) == (2 * kept * thousandths + 1000) // 2000


@pytest.mark.parametrize(
    "keep", [-0.1, 1.1, 80, math.nan, math.inf, "a lot", "1/0", None, True, Decimal("NaN"), [0.5]]
)
def test_keep_that_is_no_fraction(keep):
    with pytest.raises(ValueError, match=r"keep is a fraction .* in \[0, 1\], got"):
        keep_count(10, keep)
    with pytest.raises(ValueError, match="keep is a fraction"):
        ls.prune(normal(SMALL, 0), normal(SMALL, 1), full(SMALL), "large_final", keep)


def test_fc_schedule_of_the_paper():
    w_init, masks = normal(FC, 0), ls.Masks(full(FC))
    counts = {name: mask.numel() for name, mask in masks.items()}
    for r in range(1, 25):
        previous = masks
        masks = ls.prune(w_init, normal(FC, r), masks, "large_final", FC_KEEP, generator=r)
        for name, keep in FC_KEEP.items():
            counts[name] = (2 * counts[name] * round(10 * keep) + 10) // 20
            assert int(masks[name].sum()) == counts[name]
            assert not (masks[name] & ~previous[name]).any(), "a pruned weight never returns"
        if r == 1:
            assert list(counts.values()) == [188_160, 24_000, 900]
        if r in FC_SCHEDULE:
            assert masks.density * 100 == pytest.approx(FC_SCHEDULE[r], abs=0.0051)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("criterion", ls.pruning.CRITERIA)
def test_counts_are_exact_with_every_criterion(criterion, scope):
    w_init = {n: w.round() for n, w in normal(SMALL, 0).items()}  # zeros and ties everywhere
    w_final = {n: w.round() for n, w in normal(SMALL, 1).items()}
    masks = ls.Masks(full(SMALL))
    for r in range(4):
        previous = masks
        masks = ls.prune(w_init, w_final, masks, criterion, 0.7, scope, generator=r)
        assert (masks & ~previous).kept == 0
        if scope == "global":
            assert masks.kept == keep_count(previous.kept, 0.7)
        else:
            for name in SMALL:
                assert int(masks[name].sum()) == keep_count(int(previous[name].sum()), 0.7)


# ---- scopes ----------------------------------------------------------------------------------


def test_keep_by_name():
    w = normal(SMALL, 0)
    masks = ls.prune(w, w, full(SMALL), "large_final", {"b": 0.25, "c": "1/3"})
    assert {name: int(m.sum()) for name, m in masks.items()} == {"a": 30, "b": 10, "c": 18}


def test_layer_scope_ranks_within_the_layer():
    w = {"small": torch.arange(1.0, 11.0), "large": torch.arange(101.0, 111.0)}
    masks = ls.prune(w, w, full(dict.fromkeys(w, 10)), "large_final", 0.5)
    for mask in masks.values():
        assert mask.tolist() == [False] * 5 + [True] * 5


def test_global_scope_ranks_all_weights_together():
    w = {"small": torch.arange(1.0, 11.0), "large": torch.arange(101.0, 111.0)}
    masks = ls.prune(w, w, full(dict.fromkeys(w, 10)), "large_final", 0.6, scope="global")
    assert masks["small"].tolist() == [False] * 8 + [True] * 2
    assert masks["large"].all()


def test_pruned_values_do_not_matter():
    w_init, w_final = normal(SMALL, 0), normal(SMALL, 1)
    masks = ls.prune(w_init, w_final, full(SMALL), "random", 0.5)
    for criterion in ls.pruning.CRITERIA:
        clean = ls.prune(w_init, w_final, masks, criterion, 0.5)
        poisoned = [
            {n: torch.where(masks[n], w[n], value) for n in w}
            for w, value in ((w_init, math.nan), (w_final, math.inf))
        ]
        assert ls.prune(*poisoned, masks, criterion, 0.5) == clean


def test_all_or_nothing():
    w = normal(SMALL, 0)
    masks = ls.prune(w, w, full(SMALL), "large_final", 0.5)
    assert ls.prune(w, w, masks, "large_final", 1) == masks
    assert ls.prune(w, w, masks, "large_final", 0).kept == 0
    nothing = ls.prune(w, w, masks, "large_final", 0)
    for scope in ("layer", "global"):
        assert ls.prune(w, w, nothing, "large_init_large_final", 0.5, scope).kept == 0


def test_masks_are_new_and_arguments_untouched():
    w, masks = normal(SMALL, 0), full(SMALL)
    w["a"].requires_grad_()
    pruned = ls.prune(w, w, masks, "large_final", 0.5)
    assert all(mask.all() for mask in masks.values())
    assert not any(mask.requires_grad for mask in pruned.values())


def test_a_state_dict_and_numeric_masks_will_do():
    model = ls.sparsify_(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)))
    state = model.state_dict()
    masks = ls.prune(state, state, {"1.weight": torch.ones(2, 3)}, "large_final", 0.5)
    assert masks.kept == 3


# ---- generators --------------------------------------------------------------------------------


def test_generators():
    w = {"w": torch.ones(50)}

    def kept(generator):
        return ls.prune(w, w, full({"w": 50}), "large_final", 0.5, generator=generator)

    def seeded(seed):
        return torch.Generator().manual_seed(seed)

    assert kept(None) == kept(0)
    assert kept(0) != kept(1)
    assert kept(-1) == kept(2**64 - 1), "a seed is 64 bits"
    assert kept(seeded(5)) == kept(seeded(5))
    assert kept(seeded(5)) != kept(seeded(6))
    generator = seeded(5)
    assert kept(generator) != kept(generator), "a Generator moves on"
    state = torch.get_rng_state()
    kept(None)
    assert torch.equal(torch.get_rng_state(), state), "global state is not touched"


@pytest.mark.parametrize(
    ("generator", "error"),
    [(0.5, TypeError), (True, TypeError), ("0", TypeError), (2**64, ValueError)],
)
def test_what_is_no_generator(generator, error):
    w = {"w": torch.ones(5)}
    with pytest.raises(error, match=r"generator must be an int seed|seed must fit 64 bits"):
        ls.prune(w, w, full({"w": 5}), "large_final", 0.5, generator=generator)


# ---- criteria of one's own, and errors ---------------------------------------------------------


def test_a_criterion_of_ones_own():
    seen = []

    def closest_to_one(w_init, w_final, generator):
        seen.append((w_init.shape, generator.uniform(1).item()))
        return -(w_final - 1).abs()

    w = {"x": torch.tensor([[0.0, 1.1, 5.0, 0.9]]), "y": torch.tensor([1.0, 2.0])}
    masks = {"x": torch.tensor([[1, 1, 1, 0]]), "y": torch.tensor([1, 1])}
    pruned = ls.prune(w, w, masks, closest_to_one, {"x": 0.6, "y": 0.5})
    assert pruned["x"].tolist() == [[True, True, False, False]]
    assert pruned["y"].tolist() == [True, False]
    assert [shape for shape, _ in seen] == [(3,), (2,)], "vectors of the kept weights of one layer"
    assert seen[0][1] != seen[1][1], "each layer has draws of its own"


def test_integer_scores_are_ranked_exactly():
    scores = torch.tensor([2**53, 2**53 + 1, 2**53 - 1])
    w = {"w": torch.zeros(3)}
    pruned = ls.prune(w, w, full({"w": 3}), lambda wi, wf, gen: scores, "1/3")
    assert pruned["w"].tolist() == [False, True, False]


def call(**changes):
    arguments = {
        "w_init": normal(SMALL, 0),
        "w_final": normal(SMALL, 1),
        "masks": full(SMALL),
        "criterion": "large_final",
        "keep": 0.5,
    }
    return ls.prune(**arguments | changes)


def test_nan_scores_name_the_layer():
    w_final = normal(SMALL, 1)
    w_final["b"][3:5] = math.nan
    for scope in ("layer", "global"):
        with pytest.raises(ValueError, match="scores of b hold NaN at 2 of 40 kept weights"):
            call(w_final=w_final, scope=scope)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"criterion": "biggest"}, "criterion must be one of large_final, small_final.*'biggest'"),
        ({"scope": "model"}, 'scope must be "layer" or "global", got \'model\''),
        ({"scope": "global", "keep": {"a": 0.5}}, "keep must be one fraction for global scope"),
        ({"keep": {"a": 0.5, "z": 0.5}}, "keep names z, which has no mask; masks: a, b, c"),
        ({"keep": {"a": 1.5}}, "keep is a fraction"),
        ({"w_init": normal({"a": (6, 5)}, 0)}, "w_init has no b, which masks has; it has a"),
        ({"w_final": {}}, "w_final has no a"),
        ({"masks": {"a": torch.ones(5, 6)}}, r"w_init\['a'\] has shape \(6, 5\).*\(5, 6\)"),
        ({"masks": {"a": torch.full((6, 5), 0.5)}}, "mask of a must hold only 0 and 1"),
        (
            {"criterion": lambda wi, wf, gen: wf[:1]},
            r"criterion returned shape \(1,\) for a, expected one score per kept weight, \(30,\)",
        ),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_the_table_of_criteria_is_named_in_full():
    with pytest.raises(ValueError, match="criterion must be one of") as error:
        call(criterion="biggest")
    assert all(name in str(error.value) for name in ls.pruning.CRITERIA)
