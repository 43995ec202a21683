"""Where torch.compile sees inside an op of ours, and where an op stays one call."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from problems import FROZEN, check, conv_case, linear_problem
from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses.fake_tensor import FakeTensorMode

import lottery_sparse as ls
from lottery_sparse import ops
from lottery_sparse.ops import dispatch
from lottery_sparse.ops.common import product

CONV = ([1, 1], [0, 0], [1, 1], 1)
SHAPES = {"masked_linear": ((8, 64), (32, 64)), "masked_conv2d": ((2, 8, 6, 6), (4, 8, 3, 3))}


def graph_of(op: str, device: str) -> list[str]:
    """The ops that the compiler gets for a call, forward and backward, on fake tensors."""
    named = torch.ops.lottery_sparse
    rest = CONV if op == "masked_conv2d" else ()

    class Call(nn.Module):
        def forward(self, x: Tensor, weight: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
            y = getattr(named, op)(x, weight, mask, None, None, None, *rest)
            backward = getattr(named, f"{op}_backward")
            return y.relu(), *backward(y, x, weight, mask, None, None, *rest, True, True)

    with FakeTensorMode():
        x, weight = (torch.empty(shape, device=device) for shape in SHAPES[op])
        mask = torch.empty_like(weight, dtype=torch.bool)
        graph, _ = aot_export_module(Call(), (x, weight, mask), trace_joint=False)
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


def is_opaque(op: str, device: str = "cuda") -> bool:
    names = graph_of(op, device)
    seen = any("where" in name for name in names)
    ours = [name for name in names if name.startswith(f"lottery_sparse.{op}")]
    assert len(ours) == (0 if seen else 2)
    return not seen


@pytest.mark.parametrize("op", SHAPES)
def test_dense_products_on_a_gpu_are_seen(op, monkeypatch):
    assert not is_opaque(op)
    assert is_opaque(op, "cpu")
    with ls.use_backend("dense"):
        assert is_opaque(op)
    for name in (op, f"{op}_backward"):  # where a kernel of ours has won
        monkeypatch.setitem(dispatch.PREFERENCE["cuda"], name, ("triton", "dense"))
    assert is_opaque(op)


@pytest.fixture
def seen_on_the_cpu(monkeypatch):
    monkeypatch.setattr(product, "SEEN_INSIDE", {"cpu", "cuda"})
    for op in SHAPES:
        for name in (op, f"{op}_backward"):
            monkeypatch.setitem(dispatch.PREFERENCE["cpu"], name, ("dense",))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("op", "frozen", "packed", "dynamic"),
    [
        *(("masked_linear", frozen, True, False) for frozen in FROZEN),
        ("masked_linear", "zero", False, True),
        ("masked_conv2d", "tensor", False, False),
    ],
)
def test_the_numbers_are_the_same(op, frozen, packed, dynamic, seen_on_the_cpu, monkeypatch):
    p = (
        linear_problem(33, 65, 17, 0.5, frozen)
        if op == "masked_linear"
        else conv_case(((2, 4), (3, 3), (5, 6)), {"padding": 1}, frozen=frozen)
    )
    compiled = torch.compile(getattr(ops, op), backend="aot_eager", fullgraph=True, dynamic=dynamic)
    with monkeypatch.context() as patched:
        patched.setattr(ops, op, compiled)
        got = p.run(p.packed if packed else None)
    check(p, got)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's own
def test_an_exported_model_keeps_the_op(seen_on_the_cpu):
    model = ls.sparsify_(nn.Sequential(nn.Linear(8, 4)))
    program = torch.export.export(model, (torch.randn(2, 8),)).run_decompositions()
    names = [str(node.target) for node in program.graph.nodes]
    assert "lottery_sparse.masked_linear.default" in names


def test_the_compiler_is_not_imported_before_it_is_used():
    code = "import sys, lottery_sparse; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True)
    assert done.stdout.strip() == "False"
