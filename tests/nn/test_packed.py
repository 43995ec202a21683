"""PackedLinear and pack_."""

from __future__ import annotations

import copy
import io
import itertools

import pytest
import torch
from tolerances import after, close
from torch import nn

import lottery_sparse as ls
from lottery_sparse.nn import packed
from lottery_sparse.nn.packed import FORMATS, choose_format

pytestmark = pytest.mark.numeric

WEIGHTS = {
    "ternary": lambda: 0.3 * torch.randint(-1, 2, (20, 30)),
    "csr": lambda: torch.randn(20, 30) * (torch.rand(20, 30) < 0.1),
    "bitmap": lambda: torch.randn(20, 30) * (torch.rand(20, 30) < 0.45),
    "dense": lambda: torch.randn(20, 30),
}


@pytest.fixture(autouse=True)
def _small_weights_are_packed_too(monkeypatch):
    monkeypatch.setattr(packed, "LEAST_CSR", 0)
    monkeypatch.setattr(packed, "LEAST_BITMAP", 0)


def test_small_weights_stay_dense(monkeypatch):
    for name, format in (("LEAST_CSR", "csr"), ("LEAST_BITMAP", "bitmap")):
        weight = WEIGHTS[format]()
        monkeypatch.setattr(packed, name, weight.numel())
        assert choose_format(weight) == format
        monkeypatch.setattr(packed, name, weight.numel() + 1)
        assert choose_format(weight) == "dense"


def net():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 10)
    )
    ls.sparsify_(model)
    masks = {n: torch.rand(m.shape) < 0.2 for n, m in ls.masks_of(model).items()}
    return ls.set_masks_(model, masks)


@pytest.mark.parametrize("format", WEIGHTS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_computes_what_its_weight_says(format, bias):
    weight, b = WEIGHTS[format](), torch.randn(20) if bias else None
    layer = ls.nn.PackedLinear(weight, b)
    assert layer.format == format
    assert torch.equal(layer.effective_weight, weight)
    x = torch.randn(2, 5, 30)
    close(layer(x), nn.functional.linear(x, weight, b))
    assert not list(layer.parameters())
    assert sum(layer._buffers[n].nbytes for n in FORMATS[format].names) == layer.bytes
    assert f"format={format}, bytes={layer.bytes}" in repr(layer)


@pytest.mark.parametrize("format", WEIGHTS)
def test_a_forced_format_holds_the_weight(format):
    weight = WEIGHTS["ternary"]()
    layer = ls.nn.PackedLinear(weight, format=format)
    assert layer.format == format
    assert torch.equal(layer.effective_weight, weight)


@pytest.mark.parametrize(
    ("weight", "format"),
    [
        (torch.tensor([[1.0, -1.0], [0.0, 1.0]]).repeat(8, 8), "ternary"),
        (torch.tensor([[1.0, -1.0], [0.0, 2.0]]).repeat(8, 8), "ternary"),  # one magnitude per row
        (torch.zeros(8, 16), "ternary"),
        (torch.zeros(3, 4), "csr"),  # a ternary block takes 64 bytes, the weight 48
        (torch.ones(64, 1), "dense"),
        (torch.eye(64)[:, :1] * 3.1 + torch.eye(64)[:, 3:4], "dense"),  # starts alone are more
        (torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "dense"),
        (torch.tensor([[1.0, float("nan")]]), "dense"),
        (torch.zeros(0, 4), "dense"),
        (torch.zeros(4, 0), "dense"),
        (torch.eye(9).bfloat16() * torch.arange(9) + torch.eye(9).roll(1, 0) / 3, "csr"),
    ],
)
def test_the_format_is_chosen_by_what_the_weight_holds(weight, format):
    assert choose_format(weight) == format
    layer = ls.nn.PackedLinear(weight)
    close(layer.effective_weight, weight, equal_nan=True)
    assert layer(torch.ones(2, weight.shape[1], dtype=weight.dtype)).shape == (2, len(weight))


def weights_of_many_kinds(dtype):
    """Shapes with one row, one column, ragged blocks, wide ones; magnitudes one, few and many."""
    for rows, columns in ((1, 1), (1, 40), (40, 1), (17, 33), (64, 64), (5, 700), (700, 5)):
        for density in (0.0, 0.02, 0.1, 0.24, 0.4, 0.65, 0.9, 1.0):
            kept = torch.rand(rows, columns) < density
            yield (torch.randn(rows, columns) * kept).to(dtype)
            yield (0.5 * torch.randn(rows, columns).sign() * kept).to(dtype)
            yield (torch.randn(rows, 1) * torch.randn(rows, columns).sign() * kept).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_no_format_that_is_chosen_takes_more_than_dense(dtype):
    chosen = set()
    for weight in weights_of_many_kinds(dtype):
        layer = ls.nn.PackedLinear(weight)
        assert torch.equal(layer.effective_weight, weight)
        assert (layer.bytes < layer.dense_bytes) == (layer.format != "dense")
        assert sum(t.nbytes for t in layer.state_dict().values()) == layer.bytes
        chosen.add(layer.format)
    assert chosen == {"ternary", "dense"} | {
        torch.float32: {"csr", "bitmap"}, torch.bfloat16: {"csr"}, torch.float64: set()
    }[dtype]  # fmt: skip


def test_a_format_that_is_named_may_take_more_and_says_so():
    layer = ls.nn.PackedLinear(torch.randn(40, 1), format="csr")
    assert layer.bytes > layer.dense_bytes == 160


def bytes_of(model):
    return sum(value.nbytes for value in model.state_dict().values())


@pytest.mark.parametrize(("dtype", "mask"), [(torch.float32, 1 / 4), (torch.bfloat16, 1 / 2)])
def test_what_the_state_of_each_form_takes_is_as_documented(dtype, mask):
    def form(*verbs):
        model = nn.Sequential(nn.Linear(64, 64, bias=False, dtype=dtype))
        for verb in verbs:
            verb(model)
        return bytes_of(model) / (64 * 64 * dtype.itemsize)

    def pruned(model):
        ls.set_masks_(model, {"0.weight": torch.rand(64, 64) < 0.1})

    def pack_(model):
        ls.pack_(model, report=None)

    assert form() == 1
    assert form(ls.sparsify_, pruned) == form(ls.sparsify_, pruned, ls.compact_) == 1 + mask
    assert 2 < form(ls.supermask_) < 2.01  # and the keys of its draws
    assert form(ls.sparsify_, pack_) == 1
    assert form(ls.sparsify_, pruned, pack_) < 0.4
    assert form(ls.sparsify_, pruned, ls.densify_) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"format": "zip"},
            "format must be one of ternary, csr, bitmap, dense, got 'zip'",
        ),
        ({"format": "ternary"}, "holds weights of one magnitude"),
        ({"activations": "int4"}, 'activations must be "exact" or "int8"'),
        ({"weight": torch.ones(3)}, "weight must be floating"),
    ],
)
def test_bad_layers(arguments, message):
    with pytest.raises(ValueError, match=message):
        ls.nn.PackedLinear(**{"weight": torch.randn(3, 4), **arguments})


@pytest.mark.parametrize("format", WEIGHTS)
def test_no_gradient_flows_and_it_is_said(format):
    layer = ls.nn.PackedLinear(WEIGHTS[format]())
    with pytest.raises(RuntimeError, match="packed layers are for inference"):
        layer(torch.randn(2, 30, requires_grad=True))
    with pytest.raises(ValueError, match=r"x has shape \(2, 29\), but the layer needs"):
        layer(torch.randn(2, 29))


@pytest.mark.parametrize("before", WEIGHTS)
@pytest.mark.parametrize("after", WEIGHTS)
def test_a_state_brings_its_format(before, after):
    a, b = (ls.nn.PackedLinear(WEIGHTS[f](), torch.randn(20)) for f in (before, after))
    file = io.BytesIO()
    torch.save(a.state_dict(), file)
    file.seek(0)
    b.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(3, 30)
    assert b.format == before
    assert torch.equal(a(x), b(x))
    assert set(b.state_dict()) == set(a.state_dict())


@pytest.mark.parametrize(
    ("format", "name", "change"),
    [
        ("csr", "columns", lambda t: t + 30),
        ("csr", "columns", lambda t: t - 31),
        ("csr", "starts", lambda t: t + 1),
        ("csr", "starts", lambda t: t.flip(0)),
        ("bitmap", "bits", lambda t: t ^ 1),
        ("ternary", "codes", lambda t: t[:1]),
        ("dense", "weight", lambda t: t.T),
    ],
)
def test_a_state_that_kernels_could_not_trust_is_refused(format, name, change):
    layer = ls.nn.PackedLinear(WEIGHTS[format]())
    state = layer.state_dict()
    state[name] = change(state[name])
    x = torch.randn(3, 30)
    y = layer(x)
    with pytest.raises(RuntimeError, match=f"is no {format} weight of 20 x 30"):
        layer.load_state_dict(state)
    assert torch.equal(layer(x), y)


def forced(format, bias=True):
    torch.manual_seed(0)
    return ls.nn.PackedLinear(WEIGHTS[format](), torch.randn(20) if bias else None, format=format)


def frozen_state(layer):
    return layer.format, {n: (id(b), b._version, b.clone()) for n, b in layer.named_buffers()}


def check_untouched(layer, before):
    format, held = frozen_state(layer)
    assert format == before[0]
    assert held.keys() == before[1].keys()
    for name, (identity, version, value) in held.items():
        assert (identity, version) == before[1][name][:2]
        assert torch.equal(value, before[1][name][2])


PARTS = [
    pytest.param(format, names, id=f"{format}: {' '.join(names)}")
    for format in WEIGHTS
    for count in range(1, len(FORMATS[format].names))
    for names in itertools.combinations(FORMATS[format].names, count)
]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize(("format", "names"), PARTS)
def test_a_part_of_a_packed_weight_is_refused_before_anything_is_copied(
    format, names, assign, strict
):
    layer, other = forced(format), forced(format).state_dict()
    state = {name: other[name] for name in (*names, "bias")}
    before = frozen_state(layer)
    said = rf"{', '.join(sorted(names))}: no whole packed weight.*{format}: "
    with pytest.raises(RuntimeError, match=said):
        layer.load_state_dict(state, strict=strict, assign=assign)
    check_untouched(layer, before)


GONE = {
    "binary": {"signs": torch.zeros(20, 4, dtype=torch.int32), "scale": torch.ones(1)},
    "seeded": {
        "mask": torch.zeros(20, 4, dtype=torch.int32),
        "key": torch.tensor([1, 2, 3]),
        "scale": torch.ones(20),
    },
    "delta": {
        "values": torch.ones(40),
        "starts": torch.arange(0, 42, 2),
        "gaps": torch.ones(40, dtype=torch.uint8),
    },
}


@pytest.mark.parametrize("format", GONE)
def test_a_state_of_a_format_that_is_gone_is_refused_with_the_way_out(format):
    layer, state = forced("csr"), GONE[format] | {"bias": torch.zeros(20)}
    before = frozen_state(layer)
    said = rf'in the format "{format}", which is no longer read; pack .* `ls.densify_` it there'
    with pytest.raises(RuntimeError, match=said):
        torch.nn.Sequential(layer).load_state_dict({f"0.{name}": t for name, t in state.items()})
    check_untouched(layer, before)
    with pytest.raises(ValueError, match=f"format must be one of .*, got '{format}'"):
        ls.nn.PackedLinear(torch.randn(20, 30), format=format)


def test_several_formats_at_once_are_refused():
    layer = forced("csr")
    before = frozen_state(layer)
    state = {**forced("bitmap").state_dict(), **forced("csr").state_dict()}
    with pytest.raises(RuntimeError, match="bits, columns, starts, values: no whole packed weight"):
        layer.load_state_dict(state, strict=False)
    check_untouched(layer, before)


def test_a_bias_alone_is_taken():
    layer = forced("csr")
    values = layer.values
    layer.load_state_dict({"bias": torch.ones(20)}, strict=False)
    assert torch.equal(layer.bias, torch.ones(20))
    assert layer.values is values


def put(at, value):
    def change(t):
        t = t.clone()
        t.view(-1)[at] = value
        return t

    return change


def swapped(t):
    """The first two entries of the fullest row change places."""
    return torch.cat([t[1:2], t[:1], t[2:]])


WRONG = [
    ("csr", "starts", put(3, 2**40)),  # both ends are right
    ("csr", "starts", put(3, -1)),
    ("csr", "starts", put(0, 1)),
    ("csr", "starts", lambda t: t.int()),
    ("csr", "starts", lambda t: t[:-1]),
    ("csr", "columns", put(-1, 30)),
    ("csr", "columns", put(0, -1)),  # 65,535 in 16 bits
    ("csr", "columns", lambda t: t.int() - 2**31),
    ("csr", "columns", lambda t: t.long()),
    ("csr", "columns", torch.zeros_like),  # one column twice in a row
    ("csr", "columns", lambda t: t[:-1]),
    ("csr", "values", lambda t: t[:-1]),
    ("csr", "values", lambda t: t.long()),
    ("csr", "values", lambda t: t.view(-1, 1)),
    ("bitmap", "starts", put(3, 2**40)),
    ("bitmap", "bits", torch.zeros_like),
    ("bitmap", "bits", lambda t: torch.full_like(t, -1)),
    ("bitmap", "bits", lambda t: t ^ (1 << 30)),  # spare bits of the 30 columns
    ("bitmap", "bits", lambda t: t ^ -(2**31)),
    ("bitmap", "bits", lambda t: t.long()),
    ("bitmap", "values", lambda t: t[:-1]),
    ("ternary", "codes", put(0, 3)),
    ("ternary", "codes", put(5, -1)),
    ("ternary", "codes", put(-1, -(2**30))),  # of padding
    ("ternary", "codes", lambda t: t.long()),
    ("ternary", "scale", lambda t: t.int()),
    ("ternary", "scale", lambda t: t.expand(19)),
    ("dense", "weight", lambda t: t.int()),
    ("dense", "weight", lambda t: t.to_sparse()),
    ("dense", "weight", lambda t: t.to("meta")),
    ("csr", "starts", lambda t: t.to("meta")),
    ("csr", "values", lambda t: t.tolist()),
    ("csr", "bias", lambda t: t.int()),
    ("csr", "bias", lambda t: t[:1]),
    ("csr", "bias", lambda t: t.to("meta")),
]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize(
    ("format", "name", "change"), WRONG, ids=[f"{i} {f} {n}" for i, (f, n, _) in enumerate(WRONG)]
)
def test_tensors_that_kernels_could_not_trust_are_never_copied(
    format, name, change, assign, strict
):
    layer = forced(format)
    state = {n: v.clone() for n, v in layer.state_dict().items()}
    state[name] = change(state[name])
    if format != "csr" or name == "bias":
        layer = forced("csr")  # what is refused is the state, whatever the layer holds
    before = frozen_state(layer)
    with pytest.raises(RuntimeError, match=rf"{name}|is no {format} weight of 20 x 30"):
        layer.load_state_dict(state, strict=strict, assign=assign)
    check_untouched(layer, before)


def test_each_layer_of_a_model_is_loaded_whole_or_not_at_all():
    model = nn.Sequential(forced("csr"), nn.Linear(20, 30), forced("bitmap"), forced("ternary"))
    other = nn.Sequential(forced("bitmap"), nn.Linear(20, 30), forced("csr"), forced("csr"))
    state = other.state_dict()
    state["2.starts"] = put(3, 2**40)(state["2.starts"])
    before = frozen_state(model[2])
    with pytest.raises(RuntimeError, match=r"2\.values is no csr weight of 20 x 30"):
        model.load_state_dict(state)
    check_untouched(model[2], before)
    assert (model[0].format, model[3].format) == ("bitmap", "csr")
    x = torch.randn(3, 30)
    for i in (0, 3):
        torch.testing.assert_close(model[i](x), other[i](x))


def test_a_loaded_layer_does_not_follow_the_state_it_was_loaded_from():
    layer, state = forced("csr"), forced("csr").state_dict()
    x = torch.randn(3, 30)
    layer.load_state_dict(state)
    y = layer(x)
    for value in state.values():
        value.zero_()
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize("format", WEIGHTS)
def test_assigned_tensors_are_taken_as_they_are(format):
    layer, state = forced("csr"), forced(format).state_dict()
    layer.load_state_dict(state, assign=True)
    assert layer.format == format
    for name, value in layer.state_dict().items():
        assert value.data_ptr() == state[name].data_ptr()


def test_activation_error():
    layer = ls.nn.PackedLinear(WEIGHTS["ternary"](), torch.full((20,), 1e6), activations="int8")
    error = layer.activation_error(torch.randn(8, 30))
    assert 1e-4 < error < 0.05
    assert torch.equal(layer.bias, torch.full((20,), 1e6))
    x = torch.tensor([127.0, -5.0, 3.0] * 10)
    # whole numbers up to 127 stay what they are
    assert layer.activation_error(x) <= 2 * after(30, torch.float32)
    assert ls.nn.PackedLinear(WEIGHTS["csr"]()).activation_error(torch.randn(8, 30)) == 0.0


# ---- models ------------------------------------------------------------------------------------


@pytest.mark.parametrize("compact", [False, True])
def test_pack_keeps_what_a_model_computes(compact):
    model, x, lines = net(), torch.randn(3, 1, 6, 6), []
    y = model(x).detach()
    if compact:
        ls.compact_(model)
    layers = list(model)
    assert ls.pack_(model, report=lines.append) is model
    assert list(model) == layers  # the same modules
    close(model(x), y)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert [type(m) for m in model[::2]] == [nn.Conv2d, ls.nn.PackedLinear, ls.nn.PackedLinear]
    assert len(list(model.parameters())) == 2  # those of the convolution
    (text,) = lines
    words = [line.split() for line in text.splitlines()]
    assert [line[:2] for line in words[:3]] == [["0", "dense"], ["2", "csr"], ["4", "csr"]]
    held, dense = model[2].bytes + model[4].bytes + 4 * 36, 4 * (36 + 64 * 40 + 40 * 10)
    kept = f"{held / 1e3:,.1f} of {dense / 1e3:,.1f} kB, {held / dense:.3f} of dense"
    assert " ".join(words[3]) == f"total {kept}"
    assert "convolutions have no packed form" in text


def test_pack_prints_its_table(capsys):
    ls.pack_(ls.sparsify_(nn.Linear(3, 4)))
    assert "dense" in capsys.readouterr().out


def test_signed_constants_with_their_frozen_values_become_ternary():
    layer = ls.sparsify_(nn.Linear(50, 20))
    with torch.no_grad():
        layer.weight.copy_(0.1 * layer.weight.sign())
    for frozen in ("zero", ls.frozen.Constant(0.1)):
        copied = copy.deepcopy(layer)
        ls.set_masks_(copied, {"weight": torch.rand(20, 50) < 0.3}, frozen)
        x = torch.randn(4, 50)
        y = copied(x).detach()
        ls.pack_(copied, report=None)
        assert copied.format == "ternary"
        assert copied.bytes == 4 * 2 * 4 * 16 + 4
        close(copied(x), y)


def test_other_frozen_values_are_weights_like_the_others():
    layer = ls.sparsify_(nn.Linear(50, 20))
    ls.set_masks_(layer, {"weight": torch.rand(20, 50) < 0.1}, torch.randn(20, 50))
    x = torch.randn(4, 50)
    y = layer(x).detach()
    ls.pack_(layer, report=None)
    assert layer.format == "dense"
    close(layer(x), y)


def test_int8_is_chosen_by_the_caller_and_its_error_shown():
    layer, lines = ls.sparsify_(nn.Linear(200, 20)), []
    with torch.no_grad():
        layer.weight.copy_(0.1 * layer.weight.sign())
    x = torch.randn(4, 200)
    y = layer(x).detach()
    ls.pack_(layer, activations="int8", report=lines.append)
    assert "activations=int8" in repr(layer)
    assert "int8 activations: error 0." in lines[0]
    error = (layer(x) - y).norm() / y.norm()
    assert 0 < error < 0.05


def test_a_shared_layer_is_packed_once():
    layer = ls.sparsify_(nn.Linear(6, 6))
    model = nn.Sequential(layer, nn.ReLU(), layer)
    x = torch.randn(2, 6)
    y = model(x).detach()
    ls.pack_(model, report=None)
    assert model[0] is model[2]
    close(model(x), y)


def test_tied_weights_are_packed_each():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    ls.sparsify_(model)
    ls.set_masks_(model, {"0.weight": torch.rand(6, 6) < 0.3})
    x = torch.randn(2, 6)
    y = model(x).detach()
    for m in (copy.deepcopy(model), ls.compact_(copy.deepcopy(model))):
        ls.pack_(m, report=None)
        close(m(x), y)


def test_half_precision_layers_keep_their_dtype():
    layer = ls.sparsify_(nn.Linear(50, 20, dtype=torch.bfloat16))
    ls.set_masks_(layer, {"weight": torch.rand(20, 50) < 0.1})
    x = torch.randn(4, 50, dtype=torch.bfloat16)
    y = layer(x).detach()
    ls.pack_(layer, report=None)
    assert (layer.format, layer.values.dtype) == ("csr", torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
    close(layer(x), y)


class Louder(ls.nn.MaskedLinear):
    def forward(self, input):
        return 2 * super().forward(input)


def test_what_cannot_be_packed_is_named_and_nothing_changes():
    model = nn.Sequential(ls.nn.MaskedLinear(3, 3), Louder(3, 3))
    with pytest.raises(TypeError, match="1 is a Louder, which has no packed form"):
        ls.pack_(model)
    assert type(model[0]) is ls.nn.MaskedLinear
    with pytest.raises(ValueError, match="activations must be"):
        ls.pack_(model[0], activations="int4")


def test_a_packed_model_compiles_whole():
    model, x = net(), torch.randn(3, 1, 6, 6)
    ls.pack_(model, report=None)
    torch._dynamo.reset()  # of what other tests left to it
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    close(compiled(x), model(x))


def test_copies_and_pickles():
    layer, x = ls.nn.PackedLinear(WEIGHTS["csr"](), torch.randn(20)), torch.randn(2, 30)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    moved = copy.deepcopy(layer).to(torch.bfloat16)
    assert moved(x.bfloat16()).dtype == torch.bfloat16
