"""What train_step does not do, and that a refused call changes nothing."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from step_problems import OPTIMIZERS, WIDTHS, assert_same, batches, by_modules, network, twin
from torch import nn

import lottery_sparse as ls
from lottery_sparse.ops import dispatch

if not dispatch.built("cpu"):
    pytest.skip("the native kernels (lottery_sparse._C) are not built", allow_module_level=True)


def _with(optimizer=torch.optim.SGD, model=network, parameters=None, **options):
    def build():
        m = model()
        held = m.parameters() if parameters is None else parameters(m)
        return m, optimizer(held, **{"lr": 0.1, **options})

    return build


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (_with(torch.optim.RMSprop), TypeError, "must be SGD, Adam or AdamW.*RMSprop"),
        (_with(torch.optim.Adam, amsgrad=True), ValueError, "amsgrad=True"),
        (_with(torch.optim.Adam, capturable=True), ValueError, "capturable=True"),
        (_with(parameters=lambda m: list(m.parameters())[:2]), ValueError, "holds 2 parameters"),
        (_with(model=lambda: network(compact=False)), ValueError, "1 is a MaskedLinear.*compact_"),
        (_with(model=lambda: nn.Sequential(nn.Bilinear(2, 2, 2))), ValueError, "0 is a Bilinear"),
        (_with(model=lambda: network().append(nn.Tanh())), ValueError, "5 is a Tanh|6 is a Tanh"),
        (_with(model=lambda: network().append(nn.ReLU())), ValueError, "must end in a linear"),
        (_with(model=lambda: network().insert(2, nn.Dropout())), ValueError, "2 is a Dropout"),
        (_with(model=lambda: network().double()), ValueError, "torch.float64"),
        (_with(model=lambda: network()[1:2].requires_grad_(False)), ValueError, "not require a gr"),
    ],
)
def test_what_is_not_done_is_refused_at_once(build, error, message):
    with pytest.raises(error, match=message) as raised:
        ls.train_step(*build())
    assert "through the modules" in str(raised.value)


@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (torch.randn(5, 41), torch.zeros(5, dtype=torch.int64), ValueError, "x has shape"),
        (torch.randn(5, 40), torch.zeros(4, dtype=torch.int64), RuntimeError, "fit"),
        (torch.randn(5, 40), torch.zeros(5), ValueError, "y must be int64"),
        (torch.randn(5, 40), torch.full((5,), 10), ValueError, "in .0, 10."),
        (torch.randn(5, 40), torch.full((5,), -1), ValueError, "in .0, 10."),
        (torch.randn(0, 40), torch.zeros(0, dtype=torch.int64), RuntimeError, "batch"),
        (torch.randn(5, 40).double(), torch.zeros(5, dtype=torch.int64), RuntimeError, "x must"),
    ],
)  # fmt: skip
def test_bad_batches_change_nothing(x, y, error, message):
    model = network()
    step = ls.train_step(model, torch.optim.Adam(model.parameters(), lr=0.1))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        step(x, y)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(float(s["step"]) == 0 for s in step.optimizer.state.values())


def test_a_first_step_that_failed_leaves_the_next_one_first():
    kind, options = OPTIMIZERS["dampening"]
    model = network()
    other, other_optimizer = twin(model, kind, options)
    step = ls.train_step(model, kind(model.parameters(), **options))
    with pytest.raises(ValueError, match=r"^labels must be in \[0, \d+\), got -?\d+; ignore_index"):
        step(torch.randn(5, 40), torch.full((5,), 10))
    for x, y in batches(WIDTHS[0], 33, 3):
        step(x, y)
        by_modules(other, other_optimizer, x, y)
    assert_same(model, other)


@pytest.mark.parametrize("name", ["reference", "triton", "nonsense"])
def test_another_backend_that_is_forced_is_refused(name, monkeypatch):
    model = network()
    step = ls.train_step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    x, y = next(batches(WIDTHS[0], 5, 1))
    monkeypatch.setenv("LS_BACKEND", name)
    with pytest.raises(RuntimeError, match=f"cpu only, but '{name}' is forced.*the modules"):
        step(x, y)
    with ls.use_backend("cpu"):
        step(x, y)


class _OwnStep(torch.optim.Adam):
    def step(self, closure=None):
        raise NotImplementedError


class _SameStep(ls.optim.Adam):
    pass


def test_a_subclass_is_taken_only_with_a_step_that_is_known():
    model = network()
    with pytest.raises(TypeError, match=r"_OwnStep with a step of its own.*the modules"):
        ls.train_step(model, _OwnStep(model.parameters()))
    patched = torch.optim.SGD(model.parameters(), lr=0.1)
    patched.step = lambda closure=None: None
    with pytest.raises(TypeError, match="SGD with a step of its own"):
        ls.train_step(model, patched)
    assert ls.train_step(model, _SameStep(model.parameters())).adam


@pytest.mark.parametrize("kind", ["pre", "post"])
def test_step_hooks_are_refused_whenever_they_come(kind):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = ls.train_step(model, optimizer)
    getattr(optimizer, f"register_step_{kind}_hook")(lambda *_: None)
    with pytest.raises(ValueError, match=r"step hooks.*the modules"):
        step(*next(batches(WIDTHS[0], 5, 1)))
    with pytest.raises(ValueError, match="step hooks"):
        ls.train_step(model, optimizer)


@pytest.mark.parametrize("kind", [torch.optim.Adam, ls.optim.Adam])
def test_schedulers_see_that_the_optimizer_stepped(kind):
    model = network()
    optimizer = kind(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    step = ls.train_step(model, optimizer)  # takes the step that the scheduler wraps
    step(*next(batches(WIDTHS[0], 5, 1)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step()
