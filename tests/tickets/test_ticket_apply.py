"""Ticket.apply_ changes all of a model or nothing of it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.parameter import is_lazy

import lottery_sparse as ls
from lottery_sparse.nn.compact.base import Compact


def net():
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


def masks():
    return {"0.weight": torch.arange(20).view(4, 5) % 3 > 0, "3.weight": torch.eye(2, 4)}


def ticket(start=None, frozen=None, **others):
    torch.manual_seed(1)
    return ls.Ticket(
        ls.Masks({**masks(), **others}), {**net().state_dict(), **(start or {})}, frozen or {}
    )


def masked():
    return ls.sparsify_(net())


def compact(keep=4):
    """0 with all of its slots, 3 with `keep` of them."""
    model = masked()
    ls.set_masks_(model, {"3.weight": (torch.arange(8) < keep).view(2, 4)})
    return ls.compact_(model)


def stepped():
    """Compact, with an optimizer that holds state for its kept weights."""
    model = compact()
    model.optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(3, 5)).sum().backward()
    model.optimizer.step()
    return model


def on_meta():
    return masked().to("meta")


def of_inference_mode():
    with torch.inference_mode():
        return net()


class Picky(nn.Module):
    """Loads in a way of its own, and refuses."""

    def __init__(self):
        super().__init__()
        self.fc, self.last, self.refuses = nn.Linear(5, 4), nn.Linear(4, 2), True

    def get_extra_state(self):
        return {"refuses": self.refuses}

    def set_extra_state(self, state):
        if state["refuses"] is None:
            raise RuntimeError("this state is refused")


class Late(nn.Linear):
    """Refuses after all before it was loaded."""

    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)
        if self.bias.sum() == 0:
            args[-1].append("zero biases are refused")


def snapshot(model):
    """All that a change would show in: types, tensors and their identity, writes, values."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    tensors = [(n, id(t), is_lazy(t) or t.is_inference() or t._version) for n, t in tensors]
    values = {
        n: v.clone() if isinstance(v, torch.Tensor) and not is_lazy(v) else v
        for n, v in model.state_dict().items()
    }
    return [type(m) for m in model.modules()], tensors, values


def check_same(before, after, versions=True):
    assert before[0] == after[0]
    if versions:
        assert before[1] == after[1]
    assert before[2].keys() == after[2].keys()
    for name, value in before[2].items():
        if isinstance(value, torch.Tensor) and not value.is_meta and not is_lazy(value):
            assert torch.equal(value, after[2][name]), name


W = "3.weight"
META = torch.ones(2, 4, device="meta")
REFUSALS = {
    # what the model is
    "too few slots": (lambda: compact(1), ticket, "keeps 2 weights, but the compact layer has 1"),
    "released, so all slots": (compact, lambda: released(), "keeps 8 weights, but .* has 4 slots"),
    "optimizer state": (stepped, ticket, "Adam holds state for the kept weights of 0.weight"),
    "meta": (on_meta, ticket, "of this model is on the meta device"),
    "inference mode": (of_inference_mode, ticket, "was made in torch.inference_mode"),
    "learned masks": (lambda: ls.supermask_(net()), ticket, "masks are learned ones"),
    "lazy": (
        lambda: nn.Sequential(nn.LazyLinear(4), *net()[1:]),
        ticket,
        "0.weight of this model has no shape yet; run one forward",
    ),
    # names and shapes
    "more": (lambda: masked().append(nn.PReLU()), ticket, "this model has 4.weight, which"),
    "less": (lambda: masked()[:3], ticket, "the ticket has 3.weight, which this model has not"),
    "shape of a start": (masked, lambda: ticket({W: torch.ones(2, 5)}), r"shape \(2, 5\) in the t"),
    "shape of a mask": (
        masked,
        lambda: ticket(**{W: torch.ones(4, 2)}),
        r"3.weight has shape \(4, 2\) in the ticket, but \(2, 4\)",
    ),
    "no start": (masked, lambda: without_start(), "mask of 3.weight, but no start for it"),
    # starts
    "no std": (net, lambda: ticket({W: ls.frozen.Seeded("normal", 1)}), "3.weight needs a std"),
    "beyond": (net, lambda: ticket({W: ls.frozen.Seeded("normal", 1, 3.4e38)}), "float32 cannot"),
    "a word": (net, lambda: ticket({W: "one"}), "start of 3.weight must be a tensor.*, got 'one'"),
    "None": (net, lambda: ticket({W: None}), "start of 3.weight must be a tensor.*, got None"),
    "complex start": (
        net,
        lambda: ticket({W: torch.ones(2, 4, dtype=torch.complex64)}),
        r"start of 3.weight is complex \(torch.complex64\), but floating",
    ),
    "whole start": (net, lambda: ticket({W: torch.ones(2, 4).int()}), "is whole .*, but floating"),
    "meta start": (masked, lambda: ticket({W: META}), "3.weight of the ticket is on the meta"),
    # frozen values
    "unknown name": (
        net,
        lambda: ticket(frozen={"9.weight": torch.ones(2, 4)}),
        "the ticket has frozen values of 9.weight, but no mask",
    ),
    **{
        f"frozen {dtype}": (
            net,
            lambda dtype=dtype: ticket(frozen={W: torch.ones(2, 4).to(dtype)}),
            f"frozen values of 3.weight must be a floating tensor.*, got {dtype}",
        )
        for dtype in (torch.int64, torch.bool, torch.complex64)
    },
    "frozen shape": (net, lambda: ticket(frozen={W: torch.ones(4, 2)}), r"has shape \(4, 2\)"),
    "frozen source": (net, lambda: ticket(frozen={W: 0.5}), "frozen source of 3.weight must be"),
    "frozen beyond": (
        net,
        lambda: ticket(frozen={W: ls.frozen.Constant(1e39)}),
        "torch.float32 cannot hold",
    ),
    "frozen on meta": (masked, lambda: ticket(frozen={W: META}), "frozen values .* on the meta"),
}  # fmt: skip


def released():
    found = ticket()
    found.released = True
    return found


def without_start():
    found = ticket()
    del found.start[W]
    return found


FORMS = {"dense": net, "masked": masked, "compact": lambda: compact(8)}
CASES = [  # in all forms, where the model is not what is refused
    pytest.param(form, *rest, id=f"{name}-{kind}")
    for name, (make, *rest) in REFUSALS.items()
    for kind, form in (FORMS.items() if make in (net, masked) else [("", make)])
]


@pytest.mark.parametrize(("make", "found", "message"), CASES)
def test_what_is_refused_changes_nothing(make, found, message):
    model, found = make(), found()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        found.apply_(model)
    check_same(before, snapshot(model))


@pytest.mark.parametrize("make", FORMS.values(), ids=FORMS)
def test_a_warning_that_is_an_error_comes_before_the_first_write(make):
    """The settings of these tests make errors of warnings."""
    model, empty = make(), ticket(**{W: torch.zeros(2, 4)})
    before = snapshot(model)
    with pytest.raises(UserWarning, match=r"3\.weight keeps no weight at all"):
        empty.apply_(model)
    check_same(before, snapshot(model))
    with pytest.warns(UserWarning, match=r"3\.weight keeps no weight at all") as told:
        empty.apply_(model)
    assert len(told) == 1
    assert told[0].filename == __file__
    assert ls.masks_of(model)[W].sum() == 0


def test_a_name_with_a_line_end_is_warned_about_once_and_before():
    model, found = nn.Module(), ls.Ticket(ls.Masks({"a\nb.weight": torch.zeros(2, 3)}), {})
    model.add_module("a\nb", nn.Linear(3, 2))
    found.start.update({name: value.clone() for name, value in model.state_dict().items()})
    before = snapshot(model)
    with pytest.raises(UserWarning, match=r"a\\nb\.weight keeps no weight"):
        found.apply_(model)
    check_same(before, snapshot(model))
    with pytest.warns(UserWarning, match="keeps no weight") as told:
        found.apply_(model)
    assert len(told) == 1


def test_a_layer_that_cannot_be_masked_leaves_the_others_as_they_were():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = net()
    model[3] = Doubled(4, 2)
    before = snapshot(model)
    with (
        pytest.warns(UserWarning, match="sparsify_ skipped 3"),
        pytest.raises(ValueError, match=r"mask of 3\.weight, which is no weight of an nn\.Linear"),
    ):
        ticket().apply_(model)
    check_same(before, snapshot(model), versions=False)


@pytest.mark.parametrize("make", FORMS.values(), ids=FORMS)
def test_a_mask_of_what_is_no_weight_of_a_layer_is_refused(make):
    model = make()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"the ticket has a mask of 3\.bias, which is no weight"):
        ticket(**{"3.bias": torch.ones(2)}).apply_(model)
    check_same(before, snapshot(model), versions=False)


def picky_ticket():
    state = {**Picky().state_dict(), "_extra_state": {"refuses": None}}
    return ls.Ticket(ls.Masks({"fc.weight": torch.ones(4, 5)}), state)


BECOME = [lambda m: m, ls.sparsify_, lambda m: ls.compact_(ls.sparsify_(m))]


@pytest.mark.parametrize("form", BECOME, ids=["dense", "masked", "compact"])
def test_a_module_that_refuses_as_it_loads_gets_back_what_it_had(form):
    model = form(Picky())
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="this state is refused"):
        picky_ticket().apply_(model)
    check_same(before, snapshot(model), versions=False)


@pytest.mark.filterwarnings("ignore:sparsify_ skipped:UserWarning")
def test_a_module_that_refuses_after_the_others_were_loaded_leaves_them_as_they_were():
    model = net()
    model[3] = Late(4, 2)
    found = ls.Ticket(ls.Masks({"0.weight": masks()["0.weight"]}), net().state_dict())
    found.start["3.bias"] = torch.zeros(2)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="zero biases are refused"):
        found.apply_(model)
    check_same(before, snapshot(model), versions=False)


# ---- what is taken -------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_a_lazy_layer_that_is_not_masked_takes_its_start():
    found = ls.Ticket(ls.Masks({W: torch.eye(2, 4)}), net().state_dict())
    model = found.apply_(nn.Sequential(nn.LazyLinear(4), *net()[1:]))
    assert torch.equal(model[0].weight, found.start["0.weight"])


def test_a_start_that_is_a_whole_state_dict_brings_no_masks_of_its_own():
    """Masks are the ticket's: what the start says of a layer that is not among them is left out."""
    other = masked()
    ls.set_masks_(other, {"0.weight": torch.eye(4, 5), W: torch.eye(2, 4)}, ls.frozen.Constant(0.5))
    start = {name: value.clone() for name, value in other.state_dict().items()}
    found = ls.Ticket(ls.Masks({W: torch.eye(2, 4)}), start)
    for model in (net(), masked(), compact()):
        if isinstance(model[0], Compact):
            ls.sparsify_(model[0])
        found.apply_(model)
        assert torch.equal(ls.dense_state_dict(model)["0.weight"], start["0.weight"])
        assert torch.equal(model[3].weight_mask, torch.eye(2, 4).bool())


def test_a_buffer_of_the_model_that_is_named_like_ours_is_loaded():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))
            self.register_buffer("weight_mask", torch.ones(3))
            self.fc = nn.Linear(3, 2)

    start = {n: torch.full_like(v, 2) for n, v in Own().state_dict().items()}
    found = ls.Ticket(ls.Masks({"fc.weight": torch.ones(2, 3)}), start)
    model = found.apply_(Own())
    assert torch.equal(model.weight_mask, torch.full((3,), 2.0))
    assert torch.equal(model.fc.weight, torch.full((2, 3), 2.0))


def test_a_ticket_without_masks_is_a_start():
    model, start = net(), {n: torch.zeros_like(v) for n, v in net().state_dict().items()}
    ls.Ticket(ls.Masks({}), start).apply_(model)
    assert type(model[0]) is nn.Linear
    assert not any(value.any() for value in model.state_dict().values())


@pytest.mark.parametrize("make", FORMS.values(), ids=FORMS)
def test_other_precisions_and_frozen_sources_are_taken(make):
    frozen = {"0.weight": ls.frozen.Constant(0.5), W: torch.full((2, 4), 0.25, dtype=torch.float64)}
    found = ticket({W: ls.frozen.Seeded("sign", 1, 0.5), "0.bias": "zero"}, frozen)
    found.start["0.weight"] = found.start["0.weight"].bfloat16()
    model = found.apply_(make())
    state = ls.dense_state_dict(model)
    kept = masks()
    assert torch.equal(state[W] == 0.25, ~kept[W].bool())
    assert (state["0.weight"][~kept["0.weight"]].abs() == 0.5).all()
    assert not state["0.bias"].any()
    assert ls.masks_of(model) == found.masks
    again = ls.dense_state_dict(copy.deepcopy(found).apply_(model))
    assert all(torch.equal(again[name], state[name]) for name in state if "0.weight" not in name)
