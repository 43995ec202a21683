"""Compact layers saved, loaded, copied, converted and transformed; and that pruned weights hold."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from masked_layers import SOURCES
from test_compact_layers import OPTIMIZERS, dense_gradient, is_fresh, pair, pair_of_networks
from test_compact_layers import same_weights as same
from test_invariant import bits, network
from tolerances import USUAL, close
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import lottery_sparse as ls

frozen = pytest.mark.parametrize("frozen", SOURCES)


def copy_of(state):
    return {name: value.clone() for name, value in state.items()}


# ---- state_dict --------------------------------------------------------------------------------


@frozen
@pytest.mark.parametrize("assign", [False, True])
def test_checkpoints_go_both_ways(frozen, assign):
    plain, compact = pair(nn.Linear(7, 6), frozen)
    other_plain, other = pair(nn.Linear(7, 6), "tensor", density=0.3, spare=30)
    parameter, mask, lists = other.weight, other.weight_mask, [id(t) for t in other.kept]
    other(torch.randn(2, 7)).sum().backward()
    file = io.BytesIO()
    torch.save(plain.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    same(other, compact)
    assert is_fresh(other)
    if not assign:
        assert other.weight is parameter
        assert other.weight_mask is mask, "compiled models keep their graph"
        assert [id(t) for t in other.kept] == lists
        assert other.weight.grad is None, "it was that of other weights"
    other_plain.load_state_dict(compact.state_dict(), assign=assign)
    same(other_plain, plain)
    x = torch.randn(3, 7)
    close(other(x), plain(x))
    assert torch.equal(other_plain(x), plain(x))
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1, fused=True)
    other(x).sum().backward()
    optimizer.step()
    assert is_fresh(other)
    keep = compact.state_dict(keep_vars=True)["weight"]
    assert keep.requires_grad
    assert not any(v.requires_grad for v in compact.state_dict().values())


@pytest.mark.parametrize("assign", [False, True])
def test_dense_checkpoints_that_fit_and_that_do_not(assign):
    dense = nn.Linear(7, 6)
    _, roomy = pair(nn.Linear(7, 6), "constant", spare=42)
    with pytest.warns(UserWarning, match="now keeps 100.0%"):
        roomy.load_state_dict(dense.state_dict(), assign=assign)
    assert roomy.weight_mask.all()
    assert torch.equal(roomy.weight, dense.weight.flatten())
    x = torch.randn(3, 7)
    close(roomy(x), dense(x))
    _, tight = pair(nn.Linear(7, 6), "constant", spare=0)
    before = copy_of(tight.state_dict())
    with pytest.raises(RuntimeError, match=r"mask of weight keeps 42 weights.*ls\.sparsify_"):
        tight.load_state_dict(dense.state_dict(), assign=assign)
    assert all(torch.equal(before[n], v) for n, v in tight.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.zeros(7, 6)}, r"size mismatch for weight: the checkpoint has \(7, 6\)"),
        ({"weight": torch.zeros(17)}, r"size mismatch for weight: .*\(17,\), the model \(6, 7\)"),
        ({"weight_mask": torch.ones(7, 6)}, r"mask of weight has shape \(7, 6\).*\(6, 7\)"),
        ({"weight_mask": torch.full((6, 7), 0.5)}, r"mask of weight must hold only 0 and 1"),
        ({"weight_frozen": torch.zeros(7, 6)}, r"frozen values of weight must be"),
        ({"weight_frozen": torch.tensor([1, 255], dtype=torch.uint8)}, "cannot read"),
    ],
    ids=range(6),
)
@pytest.mark.parametrize("assign", [False, True])
def test_a_wrong_checkpoint_leaves_the_layer_untouched(changes, message, assign):
    plain, compact = pair(nn.Linear(7, 6), "constant")
    weight, before = compact.weight, copy_of(compact.state_dict())
    with pytest.raises(RuntimeError, match=message):
        compact.load_state_dict(plain.state_dict() | changes, assign=assign)
    assert all(torch.equal(before[n], v) for n, v in compact.state_dict().items())
    assert compact.weight is weight


def test_parts_of_a_checkpoint():
    plain, compact = pair(nn.Linear(7, 6), "constant")
    before = copy_of(compact.state_dict())
    missing, unexpected = compact.load_state_dict({}, strict=False)
    assert (set(missing), unexpected) == ({"weight", "bias"}, [])
    compact.load_state_dict({"bias": torch.zeros(6)}, strict=False)
    assert torch.equal(compact.weight_mask, before["weight_mask"])
    mask = plain.weight_mask.roll(1, 0)
    with pytest.raises(RuntimeError, match=r"Missing key.*weight"):
        compact.load_state_dict({"weight_mask": mask, "bias": torch.zeros(6)})
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"kept_starts"'):
        compact.load_state_dict(before | {"kept_starts": torch.zeros(1)})
    other = torch.float64
    compact.double().load_state_dict(before)
    assert compact.weight.dtype == compact.weight_effective.dtype == other


def test_a_compact_layer_on_the_meta_device_says_what_to_do():
    _, compact = pair(nn.Linear(7, 6))
    state = compact.state_dict()
    compact.to("meta")
    assert compact(torch.randn(3, 7, device="meta")).shape == (3, 6)
    with pytest.raises(RuntimeError, match=r"weight is compact and on the meta.*ls\.compact_"):
        compact.load_state_dict(state, assign=True)
    with pytest.raises(RuntimeError, match=r"has lost which weights it keeps.*ls\.compact_"):
        compact.to_empty(device="cpu")


# ---- copies, dtypes ----------------------------------------------------------------------------


@frozen
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent(copied, frozen):
    _, compact = pair(nn.Linear(7, 6), frozen)
    compact.requires_grad_()
    x = torch.randn(3, 7)
    optimizer = torch.optim.SGD(compact.parameters(), lr=0.1)
    compact(x).sum().backward()
    optimizer.step()
    other = copied(compact)
    same(other, compact)
    assert torch.equal(other(x), compact(x))
    before = copy_of(compact.state_dict())
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1, fused=True)
    other.zero_grad()
    other(x).square().sum().backward()
    optimizer.step()
    assert is_fresh(other)
    assert not torch.equal(other.weight, compact.weight)
    ls.set_masks_(other, {"weight": other.weight_mask.roll(1, 0)})
    assert all(torch.equal(before[n], v) for n, v in compact.state_dict().items())
    assert is_fresh(compact)


@frozen
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype, frozen):
    plain, compact = pair(nn.Linear(7, 6), frozen)
    plain, compact = plain.to(dtype), compact.to(dtype)
    assert compact.kept.starts.dtype == torch.int64
    same(compact, plain)
    x = torch.randn(5, 7, dtype=dtype)
    optimizer = torch.optim.SGD(compact.parameters(), lr=0.1)
    for _ in range(2):
        close(compact(x), nn.functional.linear(x, compact.effective_weight, compact.bias))
        compact(x).sum().backward()
        optimizer.step()
    assert is_fresh(compact)


@pytest.mark.parametrize(
    "source", [ls.frozen.Seeded("normal", 1), ls.frozen.Constant(0.1)], ids=repr
)
def test_values_of_a_descriptor_survive_a_trip_through_half(source):
    model = nn.Sequential(nn.Linear(7, 7), nn.Linear(7, 7))
    model[1].weight = model[0].weight
    ls.sparsify_(model)
    ls.set_masks_(model, {"0.weight": torch.rand(7, 7) < 0.5}, frozen=source)
    ls.compact_(model)
    before = model[0].effective_weight.detach()
    model.half().float()
    for layer in model:
        pruned = ~layer.weight_mask
        assert torch.equal(layer.effective_weight[pruned], before[pruned])
        assert torch.equal(layer.weight_effective, layer.effective_weight)
    assert model[0].weight is model[1].weight


# ---- writes from outside -------------------------------------------------------------------------


def test_writes_are_noticed():
    _, compact = pair(nn.Linear(7, 6), "constant")
    x = torch.randn(3, 7)

    def right():
        w = compact.effective_weight.detach()
        with ls.use_backend("dense"):  # which reads the effective weight
            try:
                close(compact(x), nn.functional.linear(x, w, compact.bias))
            except AssertionError:
                return False
            return True

    with torch.no_grad():
        compact.weight.mul_(2)
    assert right()
    nn.init.normal_(compact.weight)
    assert right()
    nn.utils.vector_to_parameters(torch.randn(compact.weight.numel() + 6), compact.parameters())
    assert right()
    compact.weight.data.copy_(torch.randn_like(compact.weight))
    assert right()
    for _ in range(5):  # another Parameter may lie where the last one was
        compact.weight = nn.Parameter(torch.randn_like(compact.weight))
        assert right()
    with torch.inference_mode():
        assert right()
    compact.weight.grad = torch.ones_like(compact.weight)
    torch.optim.SGD(compact.parameters(), lr=0.1, fused=True).step()
    assert is_fresh(compact)


@pytest.mark.parametrize("decay", [0.9, 0.9999])
def test_averaged_models(decay):
    _, compact = pair_of_networks(ls.frozen.Constant(0.1))
    average = AveragedModel(compact, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    plain = AveragedModel(
        ls.sparsify_(copy.deepcopy(compact)), multi_avg_fn=get_ema_multi_avg_fn(decay)
    )
    optimizer = torch.optim.SGD(compact.parameters(), lr=0.1)
    x = torch.randn(4, 1, 4, 4)
    for _ in range(5):
        optimizer.zero_grad()
        compact(x).square().mean().backward()
        optimizer.step()
        average.update_parameters(compact)
        plain.update_parameters(ls.sparsify_(copy.deepcopy(compact)))
    same(average.module, plain.module, 10 * USUAL)
    close(average(x), plain(x))
    for layer, original in zip(average.module, compact, strict=True):
        if hasattr(layer, "kept"):
            assert all(torch.equal(a, b) for a, b in zip(layer.kept, original.kept, strict=True))


@frozen
def test_emptied_layers_load_again(frozen):
    _, compact = pair(nn.Linear(7, 6), frozen)
    before = copy_of(compact.state_dict())
    compact.to_empty(device="cpu")
    compact.load_state_dict(before)
    same_state = compact.state_dict()
    assert all(torch.equal(before[n], v) for n, v in same_state.items())
    assert is_fresh(compact)


def test_lists_are_shared_between_processes_like_the_mask():
    _, compact = pair(nn.Linear(7, 6), "tensor")
    x = torch.randn(3, 7)
    before = compact(x)
    compact.share_memory()
    assert all(t.is_shared() for t in compact.derived())
    assert torch.equal(compact(x), before)


# ---- torch.func, autocast, export ------------------------------------------------------------


def test_functional_calls_leave_the_layer_alone():
    _, compact = pair(nn.Linear(7, 6), "constant")
    x, weight = torch.randn(3, 7), compact.weight
    before = copy_of(compact.state_dict())
    version = compact.weight_effective._version

    def call(scale):
        return torch.func.functional_call(compact, {"weight": weight * scale}, (x,))

    ys = [call(i) for i in range(4)]
    sum(y.square().sum() for y in ys[1:]).backward()
    mask = compact.weight_mask
    for i, y in enumerate(ys):
        w = torch.where(mask, before["weight"] * i, before["weight"])
        close(y, nn.functional.linear(x, w, compact.bias))
    assert compact.weight_effective._version == version
    assert weight.grad is not None
    assert all(torch.equal(before[n], v) for n, v in compact.state_dict().items())
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    close(compiled(3), ys[3])


def test_ensembles_and_per_sample_gradients():
    _, first = pair_of_networks(ls.frozen.Constant(0.1))
    models = [copy.deepcopy(first) for _ in range(3)]
    for i, model in enumerate(models[1:], 1):
        masks = {n: m.roll(i, 0) for n, m in ls.masks_of(model).items()}
        ls.set_masks_(model, masks, ls.frozen.Constant(0.1))
    parameters, buffers = torch.func.stack_module_state(models)
    x = torch.randn(5, 1, 4, 4)

    def loss(parameters, buffers, x):
        return torch.func.functional_call(models[0], (parameters, buffers), (x,)).square().sum()

    got = torch.func.vmap(torch.func.grad(loss), (0, 0, None))(parameters, buffers, x)
    one = dict(models[1].named_parameters())
    each = torch.func.vmap(torch.func.grad(loss), (None, None, 0))(
        one, dict(models[1].named_buffers()), x.unsqueeze(1)
    )
    for i, model in enumerate(models):
        model(x).square().sum().backward()
        for name, parameter in model.named_parameters():
            close(got[name][i], parameter.grad)
            if i == 1:
                close(each[name].sum(0), parameter.grad)


@frozen
@pytest.mark.parametrize("layer", [nn.Linear(7, 6), nn.Conv2d(4, 8, 3)], ids=["linear", "conv"])
def test_autocast(layer, frozen):
    plain, compact = pair(copy.deepcopy(layer), frozen)
    x = torch.randn(3, 7) if isinstance(layer, nn.Linear) else torch.randn(3, 4, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = compact(x), plain(x)
    assert y.dtype == torch.bfloat16
    close(y, expected)
    y.sum().backward()
    expected.sum().backward()
    assert compact.weight.grad.dtype == torch.float32
    close(dense_gradient(compact), plain.weight.grad)


def test_double_backward():
    plain, compact = pair(nn.Linear(4, 3, dtype=torch.float64), "tensor")
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)

    def penalty(module):
        (dx,) = torch.autograd.grad(module(x).sin().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), (x, module.weight))

    (gx, gv), (ex, ew) = penalty(compact), penalty(plain)
    close(gx, ex)
    compact.weight.grad = gv
    close(dense_gradient(compact), ew)


def test_export():
    _, compact = pair(nn.Linear(7, 6), "constant")
    x = torch.randn(3, 7)
    close(torch.export.export(compact, (x,)).module()(x), compact(x))


# ---- pruned weights hold -----------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_weights_hold(name):
    model, held = network(convolution=name == "AdamW")
    ls.compact_(model, spare=2)
    kind, arguments = OPTIMIZERS[name]
    optimizer = kind(model.parameters(), **arguments | {"weight_decay": 0.01})
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=50)
    x = torch.randn(16, 1, 4, 4) if name == "AdamW" else torch.randn(16, 4, 4)
    target = torch.randn(16, 3)
    start = copy_of(model.state_dict())
    for step in range(100):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        scaler.scale(loss * math.inf if step == 50 else loss).backward()
        scaler.step(optimizer)
        scaler.update()
    saved = model.state_dict()
    for key, value in held.items():
        layer = model.get_submodule(key.removesuffix(".weight"))
        mask = layer.weight_mask
        for now in (layer.effective_weight, layer.weight_effective, saved[key]):
            assert torch.equal(bits(now)[~mask], bits(value)[~mask]), key
        assert (saved[key] != start[key])[mask].all(), "kept weights train"
        assert not layer.weight[int(layer.kept.kept) :].any(), "spare slots hold zero"
    assert is_fresh(model)
