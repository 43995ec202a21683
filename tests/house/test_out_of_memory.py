"""Memory that runs out in the middle of an op, a step or a conversion: nothing is half done.

Every allocation fails once, one test run after another; then the same call goes through, or one of
half its size.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerances import close
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lottery_sparse as ls
from lottery_sparse import ops
from lottery_sparse.ops import dispatch

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


class Shortage(TorchDispatchMode):
    """The allocation of this number fails; what writes into tensors, or views them, takes none."""

    def __init__(self, number: int):
        super().__init__()
        self.left = number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        fresh = any(r.alias_info is None for r in func._schema.returns)
        writes = any(a.alias_info and a.alias_info.is_write for a in func._schema.arguments)
        tensors = any("Tensor" in str(r.type) for r in func._schema.returns)
        if fresh and tensors and not writes and "triton" not in _callers():
            self.left -= 1
            if self.left < 0:
                raise torch.OutOfMemoryError("tried to allocate memory.")
        return func(*args, **kwargs or {})


def _callers() -> set[str]:
    """Packages that a call comes from: Triton's interpreter has tensors of its own."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return set()
    found, frame = set(), sys._getframe()
    while frame is not None:
        found.add(frame.f_globals.get("__name__", "").split(".")[0])
        frame = frame.f_back
    return found


def fail_each(
    call: Callable[[], Any], unchanged: Callable[[], None], least: int = 1, every: int = 1
) -> Any:
    """Runs the call with its first allocation failing, its second, ... until none does."""
    for number in range(0, 1000, every):
        try:
            with Shortage(number):
                result = call()
        except torch.OutOfMemoryError:
            unchanged()
            continue
        assert number >= least, "nothing was allocated where the mode looks"
        return result
    raise AssertionError("it never goes through")


def snapshot(*tensors: Tensor) -> Callable[[], None]:
    before = [t.detach().clone() for t in tensors]

    def unchanged() -> None:
        for tensor, held in zip(tensors, before, strict=True):
            torch.testing.assert_close(tensor.detach(), held, rtol=0, atol=0, equal_nan=True)

    return unchanged


# ---- ops -----------------------------------------------------------------------------------------


def backends_of(op: str) -> list[tuple[str, str]]:
    return [(name, device) for device in DEVICES for name in dispatch.available(op, device)]


@pytest.mark.parametrize(("backend", "device"), backends_of("masked_linear"))
def test_a_product_and_its_gradients(backend, device):
    x = torch.randn(8, 40, device=device, requires_grad=True)
    weight = torch.randn(9, 40, device=device, requires_grad=True)
    mask = torch.rand(9, 40, device=device) < 0.5

    def run(rows: int = 8) -> list[Tensor]:
        y = ops.masked_linear(x[:rows], weight, mask)
        return [y, *torch.autograd.grad(y.square().sum(), [x, weight])]

    with ls.use_backend(backend):
        expected = run()
        half = run(4)
        for number in range(100):  # each time at full size, then at half
            try:
                with Shortage(number):
                    got = run()
                break
            except torch.OutOfMemoryError:
                torch.testing.assert_close(run(4), half, rtol=0, atol=0)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert number > 2


@pytest.mark.parametrize(("backend", "device"), backends_of("keep_top"))
def test_a_selection(backend, device):
    scores = [torch.randn(50, device=device), torch.randn(6, 5, device=device)]
    masks = [torch.ones_like(s, dtype=torch.bool) for s in scores]
    with ls.use_backend(backend):
        expected = ops.keep_top(scores, masks, 20)
        unchanged = snapshot(*scores, *masks)
        got = fail_each(lambda: ops.keep_top(scores, masks, 20), unchanged)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


# ---- steps ---------------------------------------------------------------------------------------


def compact_model(device: str, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = ls.sparsify_(nn.Sequential(nn.Linear(20, 9), nn.ReLU(), nn.Linear(9, 4)))
    ls.set_masks_(model, {f"{i}.weight": torch.rand(model[i].weight.shape) < 0.5 for i in (0, 2)})
    model = ls.compact_(model.to(device))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model  # pyright: ignore[reportReturnType]


OPTIMIZERS = [
    (ls.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    (ls.optim.Adam, {"lr": 0.1}),
    (ls.optim.AdamW, {"lr": 0.1}),
]


@pytest.mark.parametrize("steps_before", [0, 1])
@pytest.mark.parametrize(("cls", "options"), OPTIMIZERS, ids=[c.__name__ for c, _ in OPTIMIZERS])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_step(cls, options, steps_before, device, backend):
    if device not in dispatch.BACKENDS[backend].devices or not dispatch.built(backend):
        pytest.skip(f"{backend} does not run on {device} here")

    def made() -> tuple[nn.Sequential, Any]:
        model = compact_model(device)
        groups = [{"params": model[i].parameters(), "weight_decay": i / 10} for i in (0, 2)]
        optimizer = cls(groups, **options)
        for _ in range(steps_before):
            optimizer.step()
        return model, optimizer

    with ls.use_backend(backend):
        model, optimizer = made()
        same, expected = made()
        expected.step()
        held = [v for state in optimizer.state.values() for v in state.values()]
        unchanged = snapshot(*model.parameters(), *(v for v in held if isinstance(v, Tensor)))
        fail_each(optimizer.step, unchanged, least=0 if steps_before else 1)
    for mine, theirs in zip(model.parameters(), same.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        states = optimizer.state[mine], expected.state[theirs]
        torch.testing.assert_close(*states, rtol=0, atol=0)
    for i in (0, 2):
        assert torch.equal(model[i].weight_effective, same[i].weight_effective)


@pytest.mark.skipif(not dispatch.built("cpu"), reason="the native kernels are not built")
@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adam])
def test_a_training_step(cls):
    x, y = torch.randn(6, 20), torch.randint(4, (6,))
    models = [compact_model("cpu") for _ in range(2)]
    steps = [ls.train_step(model, cls(model.parameters(), lr=0.1)) for model in models]
    expected = steps[1](x, y)
    optimizer, parameters = steps[0].optimizer, list(models[0].parameters())
    same = snapshot(*parameters)

    def unchanged() -> None:
        same()
        for parameter in parameters:  # state that was made holds nothing yet
            assert not any(v.any() for v in optimizer.state.get(parameter, {}).values())

    got = fail_each(lambda: steps[0](x, y), unchanged)
    assert torch.equal(got, expected)
    again = snapshot(*parameters, *(v for s in optimizer.state.values() for v in s.values()))
    expected = steps[1](x, y)
    assert torch.equal(fail_each(lambda: steps[0](x, y), again, least=0), expected)
    for mine, theirs in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(mine, theirs)


# One feature becomes 1000, for a batch of 2^18: 1 GiB that the kernel asks for itself.
STEP_WITHOUT_MEMORY = """
import copy, json, resource, sys, torch
from torch import nn
import lottery_sparse as ls

torch.manual_seed(0)
model = ls.sparsify_(nn.Sequential(nn.Linear(1, 1000), nn.ReLU(), nn.Linear(1000, 2)))
ls.set_masks_(model, {"2.weight": torch.rand(2, 1000) < 0.2})
ls.compact_(model)
optimizer = getattr(torch.optim, sys.argv[1])(model.parameters(), **json.loads(sys.argv[2]))
step = ls.train_step(model, optimizer)
x, y = torch.randn(1 << 18, 1), torch.randint(2, (1 << 18,))
for _ in range(int(sys.argv[3])):
    step(x[:8], y[:8])
before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limits = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (now + (1 << 28), limits[1]))
try:
    step(x, y)
    sys.exit("it had enough memory")
except (RuntimeError, MemoryError) as error:
    resource.setrlimit(resource.RLIMIT_AS, limits)
    print(type(error).__name__, error)
after = model.state_dict(), optimizer.state_dict()["state"]
if sys.argv[3] == "0":  # made for a first step: nothing that has happened
    for state in after[1].values():
        assert all(not v.any() for v in state.values()), state
    before = before[0], after[1]
torch.testing.assert_close(after, before, rtol=0, atol=0)
step(x[:8], y[:8])
for state in optimizer.state_dict()["state"].values():
    assert state.get("step", 1 + int(sys.argv[3])) == 1 + int(sys.argv[3])
"""


@pytest.mark.skipif(not dispatch.built("cpu"), reason="the native kernels are not built")
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux")
@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize(
    ("cls", "options"), [("SGD", {"lr": 0.1, "momentum": 0.9}), ("Adam", {"lr": 0.1})]
)
def test_a_training_step_that_finds_no_memory_for_itself(cls, options, steps_before):
    done = subprocess.run(
        [sys.executable, "-c", STEP_WITHOUT_MEMORY, cls, json.dumps(options), str(steps_before)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "alloc" in done.stdout


# ---- conversions ---------------------------------------------------------------------------------


class Tied(nn.Module):
    """Two layers that share a weight, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.conv = nn.Conv2d(1, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.second(self.first(x)).view(-1, 1, 6, 6)).flatten(1)


def trained(device: str, frozen: Any, compact: bool) -> tuple[Tied, Any, Tensor]:
    torch.manual_seed(0)
    model = ls.sparsify_(Tied()).to(device)
    masks = {name: torch.rand(mask.shape) < 0.5 for name, mask in ls.masks_of(model).items()}
    ls.set_masks_(model, masks, frozen)
    if compact:
        ls.compact_(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    x = torch.randn(12, 6, device=device)
    model(x).square().sum().backward()
    optimizer.step()
    return model, optimizer, x  # pyright: ignore[reportReturnType]


def state_of(model: nn.Module, optimizer: Any) -> list[Any]:
    return [
        {k: v.clone() for k, v in model.state_dict().items()},
        [
            {k: v.clone() for k, v in optimizer.state[p].items()} if p in optimizer.state else {}
            for group in optimizer.param_groups
            for p in group["params"]
        ],
        [p.grad.clone() for p in model.parameters()],
    ]


FROZEN = ["zero", ls.frozen.Constant(0.5)]


def check_conversion(device: str, frozen: Any, convert: Callable, compact: bool) -> None:
    model, optimizer, x = trained(device, frozen, compact)
    same, expected, _ = trained(device, frozen, compact)
    y = model(x).detach()

    def works() -> None:  # some layers may have changed, whole
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert stepped == {id(p) for p in model.parameters()}
        close(model(x).detach(), y)
        state_of(model, optimizer)

    convert(same, optimizer=expected)
    fail_each(lambda: convert(model, optimizer=optimizer), works, least=8)
    torch.testing.assert_close(state_of(model, optimizer), state_of(same, expected), rtol=0, atol=0)
    torch.testing.assert_close(model(x), same(x), rtol=0, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("frozen", FROZEN, ids=str)
def test_compact_(device, frozen):
    check_conversion(device, frozen, ls.compact_, compact=False)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("frozen", FROZEN, ids=str)
def test_expand_(device, frozen):
    check_conversion(device, frozen, ls.sparsify_, compact=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("frozen", FROZEN, ids=str)
@pytest.mark.parametrize("compact", [False, True])
def test_set_masks_(device, frozen, compact):
    model, optimizer, x = trained(device, frozen, compact)
    same, expected, _ = trained(device, frozen, compact)
    new = {
        name: mask & (torch.rand(mask.shape).to(device) < 0.7)
        for name, mask in ls.masks_of(model).items()
    }

    def set_masks(model: nn.Module, optimizer: Any) -> None:
        ls.set_masks_(model, new, frozen, optimizer)

    set_masks(same, expected)
    fail_each(lambda: set_masks(model, optimizer), lambda: state_of(model, optimizer), 4, every=7)
    torch.testing.assert_close(state_of(model, optimizer), state_of(same, expected), rtol=0, atol=0)
    torch.testing.assert_close(model(x), same(x), rtol=0, atol=0)
