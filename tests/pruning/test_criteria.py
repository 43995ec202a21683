"""Every criterion against a ranking written here in NumPy: the same masks, ties included.

`ranked` is the independent script of the issue: from (w_init, w_final) and the seed alone it
computes the mask that `ls.prune` must give.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch

import lottery_sparse as ls
from lottery_sparse.pruning import criteria

# ---- an independent ranking ------------------------------------------------------------------


def philox_words(count: int, seed: int, stream: int) -> list[int]:
    """Philox4x32-10 at step 0, in Python integers: word i % 4 of block i // 4."""
    words = []
    for block in range(-(-count // 4)):
        c = [block & 0xFFFFFFFF, block >> 32, stream, 0]
        k = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
        for _ in range(10):
            p, q = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [
                (q >> 32) ^ c[1] ^ k[0],
                q & 0xFFFFFFFF,
                (p >> 32) ^ c[3] ^ k[1],
                p & 0xFFFFFFFF,
            ]
            k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
        words += c
    return words[:count]


def ranked(scores, mask, count: int, seed: int, name: str):
    """The mask of the `count` kept entries with the highest score, ties by the highest word."""
    stream = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    words = philox_words(scores.size, seed, stream)
    live = np.flatnonzero(mask)
    order = sorted(live, key=lambda i: (-scores.flat[i], -words[i], i))
    chosen = np.zeros(scores.size, dtype=bool)
    chosen[order[:count]] = True
    return chosen.reshape(scores.shape)


def same(wi, wf):
    return ((wi > 0) & (wf > 0)) | ((wi < 0) & (wf < 0))


ONE_LINE = {
    "large_final": lambda wi, wf: abs(wf),
    "small_final": lambda wi, wf: -abs(wf),
    "large_init": lambda wi, wf: abs(wi),
    "small_init": lambda wi, wf: -abs(wi),
    "magnitude_increase": lambda wi, wf: abs(wf) - abs(wi),
    "movement": lambda wi, wf: abs(wf - wi),
    "large_final_same_sign": lambda wi, wf: np.where(same(wi, wf), abs(wf), 0),
    "large_final_diff_sign": lambda wi, wf: np.where(same(wi, wf), 0, abs(wf)),
    "magnitude_increase_same_sign": lambda wi, wf: np.where(same(wi, wf), abs(wf) - abs(wi), 0),
    "magnitude_increase_diff_sign": lambda wi, wf: np.where(same(wi, wf), 0, abs(wf) - abs(wi)),
}
TWO_AXES = {"large_init_large_final": 1, "small_init_small_final": -1}


def weights(coarse: bool, shape=(7, 23), seed=3):
    """Weights at start and end; coarse ones have many ties and zeros."""
    rng = np.random.default_rng(seed)
    w_init, w_final = rng.normal(size=(2, *shape))
    if coarse:
        w_init, w_final = np.round(w_init * 1.5) / 2, np.round(w_final * 1.5) / 2
    mask = rng.random(shape) < 0.8
    return w_init.astype(np.float32), w_final.astype(np.float32), mask


def prune(criterion, w_init, w_final, mask, keep, seed=0, name="0.weight"):
    as_dict = [{name: torch.from_numpy(a)} for a in (w_init, w_final, mask)]
    return ls.prune(*as_dict, criterion, keep, generator=seed)[name].numpy()


def kept_count(mask, keep):
    return math.floor(keep * int(mask.sum()) + 0.5)


def test_every_criterion_is_checked_here():
    assert set(ls.pruning.CRITERIA) == {*ONE_LINE, *TWO_AXES, "random"}


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("coarse", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("criterion", ONE_LINE)
def test_same_mask_as_the_independent_ranking(criterion, coarse, keep):
    w_init, w_final, mask = weights(coarse)
    scores = ONE_LINE[criterion](w_init, w_final)
    for seed, name in ((0, "0.weight"), (2**63 + 5, "fc.weight")):
        expected = ranked(scores, mask, kept_count(mask, keep), seed, name)
        assert (prune(criterion, w_init, w_final, mask, keep, seed, name) == expected).all()


def test_ties_depend_on_seed_and_name_only():
    w_init, w_final, mask = weights(coarse=True)
    one = prune("large_final", w_init, w_final, mask, 0.5)
    assert (one == prune("large_final", w_init, w_final, mask, 0.5)).all()
    assert (one != prune("large_final", w_init, w_final, mask, 0.5, seed=1)).any()
    assert (one != prune("large_final", w_init, w_final, mask, 0.5, name="1.weight")).any()


# ---- two axes --------------------------------------------------------------------------------


def quantile_mask(w_init, w_final, mask, count: int, sign: int):
    """{s|w_i| >= Q_q} and {s|w_f| >= Q_q}, the common quantile q found by bisection.

    The quantile is the empirical one: a value passes q if a share of more than q is not above it,
    that is, if its rank from below (1 … n) is more than q n. Distinct values, so counts are exact.
    """
    live = mask.nonzero()
    axes = [np.sort(sign * abs(w[live])) for w in (w_init, w_final)]
    low, high = 0.0, 1.0

    def passing(q):
        cut = [np.append(a, np.inf)[min(math.floor(q * len(a)), len(a))] for a in axes]
        return mask & (sign * abs(w_init) >= cut[0]) & (sign * abs(w_final) >= cut[1])

    for _ in range(60):
        middle = (low + high) / 2
        if passing(middle).sum() >= count:
            low = middle
        else:
            high = middle
    return passing(low)


@pytest.mark.parametrize("keep", [0.05, 0.3, 0.8])
@pytest.mark.parametrize("criterion", TWO_AXES)
def test_two_axis_criteria_cut_both_axes_at_one_quantile(criterion, keep):
    w_init, w_final, mask = weights(coarse=False, shape=(31, 67))
    count = kept_count(mask, keep)
    chosen = prune(criterion, w_init, w_final, mask, keep)
    assert chosen.sum() == count
    definition = quantile_mask(w_init, w_final, mask, count, TWO_AXES[criterion])
    # One step of q can let in two weights, one by each axis: then the definition has one more
    # than asked for, and the tie decides which of the two stays.
    assert definition.sum() - count in (0, 1)
    assert not (chosen & ~definition).any()


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("criterion", TWO_AXES)
def test_two_axis_criteria_rank_by_the_lower_rank(criterion, keep):
    w_init, w_final, mask = weights(coarse=True)
    sign = TWO_AXES[criterion]

    def rank(w):
        live = sign * abs(w[mask])
        return np.array([(live <= v).sum() for v in (sign * abs(w)).flat]).reshape(w.shape)

    scores = np.minimum(rank(w_init), rank(w_final))
    expected = ranked(scores, mask, kept_count(mask, keep), 0, "0.weight")
    assert (prune(criterion, w_init, w_final, mask, keep) == expected).all()


@pytest.mark.parametrize("criterion", TWO_AXES)
def test_two_axis_criteria_treat_layers_of_any_size_alike(criterion):
    rng = np.random.default_rng(0)
    shapes = {"big.weight": (100, 100), "small.weight": (10, 10)}
    w_init, w_final = (
        {n: torch.from_numpy(rng.normal(size=s)) for n, s in shapes.items()} for _ in range(2)
    )
    masks = {n: torch.ones(s) for n, s in shapes.items()}
    pruned = ls.prune(w_init, w_final, masks, criterion, 0.5, scope="global")
    assert pruned.kept == 5050
    for mask in pruned.values():
        assert 0.35 < mask.float().mean() < 0.65


# ---- signs, NaN, random ------------------------------------------------------------------------

# every pair of signs: (w_i, w_f), whether it counts as the same sign
PAIRS = [
    (1.0, 2.0, True),
    (-1.0, -2.0, True),
    (1.0, -2.0, False),
    (-1.0, 2.0, False),
    (0.0, 2.0, False),
    (-0.0, -2.0, False),
    (1.0, 0.0, False),
    (0.0, 0.0, False),
]


@pytest.mark.parametrize(("w_init", "w_final", "is_same"), PAIRS)
def test_zero_is_never_the_same_sign(w_init, w_final, is_same):
    wi, wf = torch.tensor([w_init]), torch.tensor([w_final])
    size, grown = abs(w_final), abs(w_final) - abs(w_init)

    def score(name):
        return ls.pruning.CRITERIA[name](wi, wf).item()

    assert score("large_final_same_sign") == (size if is_same else 0)
    assert score("large_final_diff_sign") == (0 if is_same else size)
    assert score("magnitude_increase_same_sign") == (grown if is_same else 0)
    assert score("magnitude_increase_diff_sign") == (0 if is_same else grown)
    assert ls.pruning.SIGN_MASKS["large_final_same_sign_single"](wi, wf).item() is is_same
    assert ls.pruning.SIGN_MASKS["large_final_diff_sign_single"](wi, wf).item() is not is_same


def test_sign_products_of_tiny_weights_do_not_underflow():
    tiny = torch.tensor([1e-30, -1e-30])
    assert torch.equal(criteria.large_final_same_sign(tiny, tiny), tiny.abs())


def test_same_sign_that_shrank_ranks_below_changed_sign():
    wi, wf = torch.tensor([2.0, 2.0]), torch.tensor([1.0, -5.0])
    assert criteria.magnitude_increase_same_sign(wi, wf).tolist() == [-1.0, 0.0]


# those that look at w_final; the others never see it
SEES_FINAL = sorted(set(ls.pruning.CRITERIA) - {"large_init", "small_init", "random"})


@pytest.mark.parametrize("at", [(0, 0), (1, 1)], ids=["same sign", "changed sign"])
@pytest.mark.parametrize("criterion", SEES_FINAL)
def test_nan_is_an_error_that_names_the_layer(criterion, at):
    w_init, w_final, mask = weights(coarse=False)
    mask[:2] = True
    w_init[0, 0] = w_final[0, 0] = w_init[1, 1] = 1.0
    w_final[at] = np.nan
    with pytest.raises(ValueError, match=r"scores of 3\.weight hold NaN at 1 of"):
        prune(criterion, w_init, w_final, mask, 0.5, name="3.weight")
    mask[at] = False
    prune(criterion, w_init, w_final, mask, 0.5)  # a pruned NaN is nobody's business


def test_random_is_uniform_fresh_and_seeded():
    w = torch.randn(50, 40)
    a, b = (ls.pruning.CRITERIA["random"](w, w, seed) for seed in (0, 1))
    assert torch.equal(a, ls.pruning.CRITERIA["random"](w, w, 0))
    assert (a != b).float().mean() > 0.99
    assert abs(a.mean() - 0.5) < 0.02
    assert abs(np.corrcoef(a.flatten(), w.abs().flatten())[0, 1]) < 0.08
    stream = ls.random.Stream(0, "x")
    assert (
        ls.pruning.CRITERIA["random"](w, w, stream) != ls.pruning.CRITERIA["random"](w, w, stream)
    ).any()


def test_random_prunes_each_layer_on_its_own():
    w = {n: torch.randn(20, 20) for n in ("a", "b")}
    masks = ls.prune(w, w, {n: torch.ones(20, 20) for n in w}, "random", 0.5)
    assert (masks["a"] != masks["b"]).any()
