"""One weight has one key, however the model is wrapped, and its masks go in and out."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

import lottery_sparse as ls
from lottery_sparse.pruning.names import keys_of, matched

# ---- the rule ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("0.weight", "0.weight"),
        ("module.0.weight", "0.weight"),
        ("module._orig_mod.0.weight", "0.weight"),
        ("_orig_mod.module.0.weight", "0.weight"),
        ("features.module.0.weight", "features.0.weight"),
        ("blocks.1._orig_mod.fc.weight", "blocks.1.fc.weight"),
        ("_fsdp_wrapped_module.a._fsdp_wrapped_module.weight", "a.weight"),
        ("a._checkpoint_wrapped_module.weight", "a.weight"),
        ("module", "module"),
        ("my_module.weight", "my_module.weight"),
    ],
)
def test_a_key_is_the_name_without_what_wrappers_add(name, key):
    assert keys_of([name]) == {name: key}


OWN = ["module.fc.weight", "fc.weight"]  # a module of the model's own


@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_names_that_would_be_one_keep_a_module_of_the_models_own(wrapper):
    wrapped = [wrapper + name for name in OWN]
    assert list(keys_of(wrapped).values()) == OWN
    assert matched(OWN, wrapped, "masks") == dict(zip(OWN, wrapped, strict=True))
    assert matched(wrapped, OWN, "masks") == dict(zip(wrapped, OWN, strict=True))


def test_an_ambiguous_name_is_refused():
    with pytest.raises(ValueError, match=r"masks has _orig_mod\.fc\.weight, which may be module"):
        matched(["_orig_mod.fc.weight"], OWN, "masks")
    with pytest.raises(ValueError, match=r"a\.weight and module\.a\.weight, which are both a\.w"):
        matched(["a.weight", "module.a.weight"], ["a.weight"], "masks")
    # the model's own names are never ambiguous, and unknown ones are for the caller to refuse
    assert matched(["fc.weight"], OWN, "masks") == {"fc.weight": "fc.weight"}
    assert matched(["x.weight"], OWN, "masks") == {"x.weight": "x.weight"}


# ---- models --------------------------------------------------------------------------------------


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Sequential(nn.Linear(10, 4)))


def compiled(model):
    return torch.compile(model, backend="eager")


def in_parts(model):
    for name in "0", "2":
        setattr(model, name, checkpoint_wrapper(compiled(getattr(model, name))))
    return model


WRAPPERS = {
    "compile": compiled,
    "data parallel": nn.DataParallel,
    "both": lambda model: nn.DataParallel(compiled(model)),
    "in parts": in_parts,
}
wrapped = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)


@pytest.fixture(autouse=True)
def no_grad():
    """Dynamo warns of layers compiled one by one, whose inputs are no leaves."""
    with torch.no_grad():
        yield


def values(masks):
    return [mask.tolist() for mask in masks.values()]


def nothing(model, stop_at=None):
    """A training that moves weights by their values alone."""
    for parameter in model.parameters():
        parameter.add_(parameter.cos(), alpha=0.1)


def pruned(model, criterion="random"):
    ls.sparsify_(model)
    state = model.state_dict()
    return ls.prune(state, state, ls.masks_of(model), criterion, keep=0.5, generator=1)


@wrapped
@pytest.mark.parametrize("criterion", ["random", lambda a, b, gen: torch.zeros_like(b)])
def test_one_seed_gives_one_mask(wrap, criterion):
    """The control, and a criterion of ties alone."""
    assert values(pruned(wrap(network()), criterion)) == values(pruned(network(), criterion))


@wrapped
def test_masks_go_from_plain_to_wrapped_and_back(wrap):
    plain, other = ls.sparsify_(network()), ls.sparsify_(wrap(network()))
    masks, theirs = pruned(plain), pruned(other)
    assert theirs.keys() <= other.state_dict().keys()
    frozen = {name: ls.frozen.Seeded("normal", seed=3) for name in masks}
    ls.set_masks_(other, masks, frozen)
    assert values(ls.masks_of(other)) == values(masks)
    ls.set_masks_(plain, theirs, dict(zip(theirs, frozen.values(), strict=True)))
    x = torch.randn(5, 12)
    assert torch.equal(plain(x), other(x))


@wrapped
def test_prune_takes_weights_and_masks_of_models_wrapped_otherwise(wrap):
    plain, other = ls.sparsify_(network()), ls.sparsify_(wrap(network()))
    for masks in ls.masks_of(plain), ls.masks_of(other):
        keep = {next(iter(ls.masks_of(plain))): 0.25}
        new = ls.prune(plain.state_dict(), other.state_dict(), masks, "large_final", keep)
        assert list(new) == list(masks)
        assert [int(mask.sum()) for mask in new.values()] == [30, 40]


@wrapped
def test_a_ticket_is_that_of_the_plain_model_and_fits_either(wrap):
    arguments = (nothing, 2, 0.5, "random", "reinit", "freeze_reinit")
    ticket = ls.find_ticket(network(), *arguments, generator=2)
    theirs = ls.find_ticket(wrap(network()), *arguments, generator=2)
    assert values(theirs.masks) == values(ticket.masks)
    x = torch.randn(5, 12)
    expected = ticket.apply_(network(seed=1))(x)
    for found, model in (ticket, wrap(network(seed=1))), (theirs, network(seed=1)):
        assert torch.equal(found.apply_(model)(x), expected)


@wrapped
def test_a_search_is_resumed_in_a_model_wrapped_otherwise(wrap):
    tickets = []
    whole = ls.find_ticket(network(), nothing, 2, 0.5, generator=2, on_round=tickets.append)
    resumed = ls.find_ticket(wrap(network()), nothing, 2, 0.5, generator=2, resume=tickets[1])
    assert values(resumed.masks) == values(whole.masks)


@wrapped
def test_learned_masks_and_their_tickets(wrap):
    plain, other = network(), wrap(network())
    for model in plain, other:
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer.bias.zero_()
        ls.supermask_(model, seed=3)
    x = torch.randn(5, 12)
    assert torch.equal(plain(x), other(x))
    names = list(ls.masks_of(ls.learning.use_masks_(plain.eval(), 2)))
    ls.learning.use_masks_(other.eval(), ls.masks_of(plain))
    assert torch.equal(plain(x), other(x))
    ticket = ls.Ticket.of(other)
    assert list(ticket.named_as(plain).masks) == names
    torch.testing.assert_close(ticket.apply_(network())(x), plain(x))


def test_the_draws_of_a_ticket_stay_those_of_its_weights(tmp_path):
    """A seeded start without a stream draws by the name, which is another one when wrapped."""
    source = ls.frozen.Seeded("normal", seed=4, std=0.2)
    keep = {name: torch.rand(shape) < 0.5 for name, shape in SHAPES.items()}
    start = {**dict.fromkeys(SHAPES, source), "0.bias": "zero", "2.0.bias": "zero"}
    ticket = ls.Ticket(ls.Masks(keep), start)
    expected = ticket.apply_(network()).state_dict()
    for wrap in WRAPPERS.values():
        state = ticket.apply_(wrap(network())).state_dict()
        assert all(
            torch.equal(a, b) for a, b in zip(state.values(), expected.values(), strict=True)
        )
    theirs = ls.Ticket(
        ls.Masks({f"module.{name}": mask for name, mask in keep.items()}),
        {f"module.{name}": value for name, value in start.items()},
    )
    theirs.save(tmp_path / "t")
    loaded = ls.Ticket.load(tmp_path / "t").verify()
    again = loaded.apply_(network()).state_dict()
    assert all(torch.equal(again[name], expected[name]) for name in expected)


SHAPES = {"0.weight": (10, 12), "2.0.weight": (4, 10)}


def test_the_state_of_a_model_with_hidden_wrappers_is_that_of_the_plain_one():
    model = ls.set_masks_(ls.sparsify_(network()), pruned(network()))
    expected = ls.dense_state_dict(model)
    model[0] = checkpoint_wrapper(model[0])
    assert list(ls.masks_of(model)) == list(SHAPES)
    assert ls.dense_state_dict(model).keys() == expected.keys()
    network().load_state_dict(ls.dense_state_dict(model))


def test_an_average_takes_the_masks_of_its_model():
    model = ls.sparsify_(network())
    average = AveragedModel(model)
    masks = pruned(network())
    ls.set_masks_(average, masks)
    assert values(ls.masks_of(average)) == values(masks)
