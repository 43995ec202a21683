"""Masks as values: algebra, counts, the table, bits and what they refuse."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

import lottery_sparse as ls

NAMES = ("0.weight", "fc.weight")


def some_masks(seed: int = 0, shapes=((3, 5), (2, 1, 3, 3))) -> ls.Masks:
    rng = np.random.default_rng(seed)
    return ls.Masks(
        {n: torch.as_tensor(rng.random(s) < 0.5) for n, s in zip(NAMES, shapes, strict=True)}
    )


@pytest.mark.parametrize(
    ("operation", "boolean"),
    [
        (lambda a, b: a & b, np.logical_and),
        (lambda a, b: a | b, np.logical_or),
        (lambda a, b: a ^ b, np.logical_xor),
        (lambda a, b: ~a, lambda a, b: ~a),
    ],
    ids=["and", "or", "xor", "not"],
)
def test_algebra(operation, boolean):
    a, b = some_masks(1), some_masks(2)
    result = operation(a, b)
    assert isinstance(result, ls.Masks)
    assert list(result) == list(NAMES)
    for name in NAMES:
        assert result[name].dtype == torch.bool
        assert (result[name].numpy() == boolean(a[name].numpy(), b[name].numpy())).all()
    assert a == some_masks(1), "operands stay what they were"


def test_counts_density_and_overlap():
    a = ls.Masks({"w": torch.tensor([[1, 1, 0, 0]]), "v": torch.tensor([1, 0])})
    b = ls.Masks({"w": torch.tensor([[1, 0, 1, 0]]), "v": torch.tensor([1, 1])})
    assert (a.kept, a.total, a.density) == (3, 6, 0.5)
    assert a.overlap(b) == 2 / 5
    assert a.overlap(a) == 1.0
    assert a.overlap(~a) == 0.0
    assert (~a & a).overlap(~a & a) == 1.0, "neither keeps any: the same"
    assert ls.Masks({}).density == 1.0
    assert repr(a) == "Masks(2 tensors, 3 of 6 kept)"


def test_equality():
    a = some_masks(1)
    assert a == some_masks(1)
    assert a != some_masks(2)
    assert a != ls.Masks({"0.weight": a["0.weight"]})
    assert a != ls.Masks({n: m.flatten() for n, m in a.items()})
    assert (a == 3) is False
    assert (a != 3) is True
    assert (a == dict(a)) is (dict(a) == a) is False
    assert (a != some_masks(1)) is False
    with pytest.raises(TypeError, match="unhashable"):
        hash(a)


def test_table_names_every_tensor_and_the_total():
    masks = ls.Masks({"fc.weight": torch.eye(4), "conv.weight": torch.ones(2, 1, 3, 3)})
    lines = masks.table().splitlines()
    assert [line.split() for line in lines] == [
        ["fc.weight", "4x4", "4", "of", "16", "0.2500"],
        ["conv.weight", "2x1x3x3", "18", "of", "18", "1.0000"],
        ["total", "22", "of", "34", "0.6471"],
    ]
    assert len({len(line) for line in lines}) == 1, "columns line up"
    assert ls.Masks({}).table().split() == ["total", "0", "of", "0", "1.0000"]


def test_bits_by_their_definition():
    mask = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 1, 0, 1]])
    bits = ls.Masks({"w": mask}).to_bits()["w"]
    assert bits.dtype == torch.uint8
    assert bits.tolist() == [0b10001001, 0b10]  # entry 8 b + j is bit j of byte b


@given(
    shapes=st.tuples(
        st.lists(st.integers(0, 9), min_size=0, max_size=3), st.lists(st.integers(0, 9), max_size=3)
    ),
    seed=st.integers(0, 99),
)
def test_bits_round_trip(shapes, seed):
    masks = some_masks(seed, shapes)
    assert ls.Masks.from_bits(masks.to_bits(), dict(zip(NAMES, shapes, strict=True))) == masks


def test_bits_of_a_strided_mask():
    mask = torch.rand(6, 4) > 0.5
    there = ls.Masks({"w": mask.T}).to_bits()
    assert torch.equal(ls.Masks.from_bits(there, {"w": (4, 6)})["w"], mask.T)


@pytest.mark.parametrize(
    ("bits", "shapes", "message"),
    [
        ({"w": torch.tensor([1], dtype=torch.uint8)}, {"v": (3,)}, "shapes has no w; it has v"),
        ({"w": torch.tensor([1, 0], dtype=torch.uint8)}, {"w": (3,)}, r"uint8 \[1\] for shape"),
        ({"w": torch.tensor([1])}, {"w": (3,)}, "got torch.int64"),
        ({"w": torch.tensor([8], dtype=torch.uint8)}, {"w": (3,)}, "spare bit set after entry 3"),
    ],
)
def test_bits_that_do_not_fit(bits, shapes, message):
    with pytest.raises(ValueError, match=message):
        ls.Masks.from_bits(bits, shapes)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float16, torch.float64])
def test_numbers_that_are_zero_or_one(dtype):
    masks = ls.Masks({"w": torch.eye(3, dtype=dtype)})
    assert masks["w"].dtype == torch.bool
    assert torch.equal(masks["w"], torch.eye(3).bool())


@pytest.mark.parametrize("wrong", [0.5, 2.0, -1.0, float("nan")])
def test_other_numbers_are_refused(wrong):
    mask = torch.ones(2, 2)
    mask[1, 0] = wrong
    with pytest.raises(ValueError, match=f"mask of w must hold only 0 and 1.*got {wrong}"):
        ls.Masks({"w": mask})


@pytest.mark.parametrize(
    ("masks", "message"),
    [([torch.ones(2)], "got list"), ({"w": np.ones(2)}, "mask of w must be a tensor, got ndarray")],
)
def test_other_types_are_refused(masks, message):
    with pytest.raises(TypeError, match=message):
        ls.Masks(masks)


def test_masks_that_do_not_belong_together():
    a = some_masks()
    with pytest.raises(ValueError, match=r"only one of them has: fc\.weight"):
        a & ls.Masks({"0.weight": a["0.weight"]})
    with pytest.raises(ValueError, match=r"masks of 0.weight must have one shape.*\(1, 5\)"):
        a | some_masks(shapes=((1, 5), (2, 1, 3, 3)))  # would broadcast
    with pytest.raises(TypeError, match=r"must be ls\.Masks, got dict"):
        a ^ dict(a)


# ---- a dict whose entries stay, in files and checkpoints -----------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda masks: masks.__setitem__("fc.weight", torch.ones(1)),
        lambda masks: masks.update({"v": torch.ones(1)}),
        lambda masks: masks.setdefault("v", torch.ones(1)),
        lambda masks: masks.pop("fc.weight"),
        lambda masks: masks.popitem(),
        lambda masks: masks.__delitem__("fc.weight"),
        lambda masks: masks.clear(),
    ],
)
def test_entries_stay(change):
    masks = some_masks()
    with pytest.raises(TypeError, match=r"are a value.*make new ones: ls\.Masks\(\{\*\*masks"):
        change(masks)
    assert masks == some_masks()
    new = ls.Masks({**masks, "v": torch.ones(1)})
    assert list(new) == [*NAMES, "v"]


def test_a_name_moves_on_to_the_union():
    a = both = some_masks(1)
    both |= some_masks(2)
    assert both == some_masks(1) | some_masks(2)
    assert a == some_masks(1)
    assert isinstance(both, ls.Masks)


def same_masks(a, b):
    return type(a) is type(b) is ls.Masks and a == b and list(a) == list(b)


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy]
    + [lambda m, p=p: pickle.loads(pickle.dumps(m, p)) for p in range(pickle.HIGHEST_PROTOCOL + 1)],
    ids=["copy", "deepcopy"] + [f"pickle {p}" for p in range(pickle.HIGHEST_PROTOCOL + 1)],
)
def test_copies_and_pickles(copied):
    masks = some_masks()
    again = copied(masks)
    assert same_masks(again, masks)
    if copied is copy.deepcopy:
        assert all(again[name].data_ptr() != masks[name].data_ptr() for name in masks)


def test_a_pickle_of_masks_that_were_no_dict():
    state = {"_masks": dict(some_masks())}
    old = b"\x80\x02clottery_sparse.masks\nMasks\n)\x81" + pickle.dumps(state, 2)[2:-1] + b"b."
    assert same_masks(pickle.loads(old), some_masks())


VALUES = {
    "masks": some_masks(),
    "constant": ls.frozen.Constant(0.5),
    "unset": ls.frozen.Constant(),
    "seeded": ls.frozen.Seeded("normal", 2**63 + 1, 0.1, 7),
    "sign of": ls.frozen.SignOf(ls.frozen.Seeded("sign", 3, 1.0), 0.5),
}


def through_torch(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file)  # with its default, weights_only=True


@pytest.mark.parametrize("name", VALUES)
def test_values_in_a_checkpoint_of_torch_save(name):
    model = torch.nn.Linear(2, 2)
    back = through_torch({"model": model.state_dict(), "ours": [VALUES[name]]})
    assert type(back["ours"][0]) is type(VALUES[name])
    assert back["ours"] == [VALUES[name]]
    assert copy.deepcopy(VALUES[name]) == VALUES[name]


def test_a_ticket_in_a_checkpoint_of_torch_save(tmp_path):
    start = {"w": torch.zeros(3, 5), "v": ls.frozen.Seeded("normal", 1, 1.0)}
    ticket = ls.Ticket(ls.Masks({"w": torch.ones(3, 5)}), start, {"w": torch.ones(3, 5)})
    for each in (ticket, saved_and_loaded(ticket, tmp_path / "t")):
        back = through_torch({"ticket": each})["ticket"].verify()
        assert type(back) is ls.Ticket
        assert (back.masks, back.saved) == (each.masks, each.saved)
        assert torch.equal(back.start["w"], start["w"])
        assert back.start["v"] == start["v"]


def saved_and_loaded(ticket, path):
    ticket.save(path)
    return ls.Ticket.load(path)


@pytest.mark.parametrize(
    ("forged", "message"),
    [
        (lambda: _Forged(ls.Masks, ({"w": torch.full((2,), 0.5)},)), "must hold only 0 and 1"),
        (lambda: _Forged(ls.Masks, ({"w": 1},)), "mask of w must be a tensor"),
        (lambda: _Forged(ls.frozen.Seeded, ("moon", 1)), "law must be one of"),
        (lambda: _Forged(ls.frozen.Constant, (-1.0,)), "constant is a magnitude"),
    ],
)
def test_a_forged_checkpoint_goes_through_the_checks(forged, message):
    with pytest.raises(Exception, match=message):
        through_torch(forged())


class _Forged:
    """Pickled as a call of its own choice."""

    def __init__(self, kind, args):
        self.call = kind, args

    def __reduce__(self):
        return self.call


def test_the_name_in_a_checkpoint_is_the_public_one():
    """Where lottery_sparse is not imported, torch's error names it, and modules may move."""
    file = io.BytesIO()
    torch.save(some_masks(), file)
    assert b"clottery_sparse\nMasks" in file.getvalue()


def test_whatever_saves_dicts_of_tensors_saves_masks(tmp_path):
    masks = some_masks()
    safetensors.torch.save_file(masks, tmp_path / "m.safetensors")
    assert ls.Masks(safetensors.torch.load_file(tmp_path / "m.safetensors")) == masks
    assert dict(masks).keys() == masks.keys()


def test_names_of_a_file_are_one_printable_line():
    evil = "\x1b[31mw\nfaked"
    assert "\x1b" not in ls.Masks({evil: torch.ones(2)}).table()
    for call in (
        lambda: ls.Masks({evil: torch.full((2,), 0.5)}),
        lambda: ls.Masks({evil: torch.ones(2)}) & ls.Masks({}),
        lambda: ls.Masks.from_bits({evil: torch.zeros(1, dtype=torch.uint8)}, {evil: (9,)}),
        lambda: ls.set_masks_(ls.nn.MaskedLinear(2, 2), {evil: torch.ones(2)}),
        lambda: ls.prune({}, {}, {evil: torch.ones(2)}, "random", 0.5),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value).isprintable()


def test_device():
    assert some_masks().to("meta")["0.weight"].is_meta
