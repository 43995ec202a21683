"""Arguments on other devices, GPUs that kernels cannot use, and sizes beyond what they count."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lottery_sparse as ls
from lottery_sparse import ops
from lottery_sparse.ops import dispatch
from lottery_sparse.ops.bits import reference
from lottery_sparse.ops.compact import op as products
from lottery_sparse.ops.compact.kept import KeptLists
from lottery_sparse.ops.masked.arguments import MaskedArgs
from lottery_sparse.ops.packed import formats
from lottery_sparse.ops.packed.arguments import CsrArgs, TernaryArgs
from lottery_sparse.ops.supermask.arguments import SupermaskArgs

CUDA = torch.device("cuda", 0)
# Where arguments are, and where one of them is instead.
PLACES = [("cpu", "meta")] + ([("cuda", "cpu"), ("cpu", "cuda")] * torch.cuda.is_available())

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


# ---- devices -------------------------------------------------------------------------------------


def calls() -> dict[str, tuple[Any, dict[str, Any]]]:
    """Every op, and its arguments by name."""
    mask, bias, key = torch.rand(5, 7) < 0.5, torch.randn(5), ls.random.key(0)
    x, weight = torch.randn(3, 7), torch.where(mask, torch.randn(5, 7), 0.0)
    images, kernels = torch.randn(2, 3, 6, 6), torch.rand(4, 3, 3, 3)
    kept = kernels < 0.5
    values, starts, columns = formats.pack_csr(weight, mask)
    signs = ops.SignConstant.of(weight, 0.5)
    bits = reference.pack_mask(mask)
    lists, codes = KeptLists.of, formats.pack_ternary(weight.sign())
    given = {"x": x, "weight": weight, "mask": mask, "bias": bias}
    learned = {"x": x, "score": weight, "key": key, "bias": bias}
    csr = {"x": x, "values": values, "starts": starts, "bias": bias}
    both = [torch.randn(4), torch.randn(5)], [torch.ones(4).bool(), torch.ones(5).bool()]
    return {
        "masked_linear": (ops.masked_linear, given | {"frozen": weight + 1}),
        "masked_linear, signs": (ops.masked_linear, given | {"frozen": signs}),
        "masked_conv2d": (ops.masked_conv2d, {"x": images, "weight": kernels, "mask": kept}),
        "compact_linear": (
            products.compact_linear,
            {"x": x, "values": values, "kept": lists(mask), "effective": weight, "bias": bias},
        ),
        "compact_conv2d": (
            products.compact_conv2d,
            {
                "x": images,
                "values": kernels[kept],
                "kept": lists(kept.flatten(1)),
                "effective": kernels,
            },
        ),
        "ternary_linear": (
            ops.ternary_linear,
            {"x": x, "codes": codes, "scale": torch.ones(1), "rows": 5, "bias": bias},
        ),
        "csr_linear": (ops.csr_linear, csr | {"columns": columns}),
        "bitmap_linear": (ops.bitmap_linear, csr | {"bits": bits}),
        "keep_top": (ops.keep_top, {"scores": both[0], "masks": both[1], "count": 3}),
        "sample_mask": (ops.sample_mask, {"score": weight, "key": key}),
        "sample_bits": (ops.sample_bits, {"score": weight, "key": key}),
        "supermask_linear": (ops.supermask_linear, learned | {"weight": weight}),
        "supermask_linear, signs": (ops.supermask_linear, learned | {"weight": signs}),
        "supermask_conv2d": (
            ops.supermask_conv2d,
            {"x": images, "score": kernels, "weight": kernels, "key": key},
        ),
    }


def moved(value: Any, device: str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, list):
        return [moved(v, device) for v in value]
    if hasattr(value, "_fields"):
        return type(value)(*(moved(v, device) for v in value))
    return value


def one_moved(value: Any, device: str) -> list[Any]:
    """The value with one of its tensors on `device`, for each of them."""
    if isinstance(value, Tensor):
        return [value.to(device)]
    if not isinstance(value, list | tuple):
        return []
    build = list if isinstance(value, list) else lambda parts: type(value)(*parts)
    return [
        build([*value[:i], new, *value[i + 1 :]])
        for i in range(len(value))
        for new in one_moved(value[i], device)
    ]


@pytest.mark.parametrize(("here", "elsewhere"), PLACES)
@pytest.mark.parametrize("op", calls())
def test_an_argument_elsewhere_is_named_with_both_devices(op, here, elsewhere):
    function, arguments = calls()[op]
    arguments = {name: moved(value, here) for name, value in arguments.items()}
    function(**arguments)
    for name, value in arguments.items():
        for other in one_moved(value, elsewhere):
            if getattr(other, "constant", None) is not getattr(value, "constant", None) and (
                elsewhere != "meta"
            ):
                continue  # one number moves by itself
            with pytest.raises(ValueError, match=rf"{elsewhere}") as caught:
                function(**arguments | {name: other})
            assert here in str(caught.value)
            assert str(caught.value).endswith(".")


@pytest.mark.parametrize("make", ["masked", "compact", "packed"])
@pytest.mark.parametrize(("here", "elsewhere"), PLACES)
def test_a_layer_whose_input_is_elsewhere(make, here, elsewhere):
    model = ls.sparsify_(nn.Sequential(nn.Linear(7, 5)))
    ls.set_masks_(model, {"0.weight": torch.rand(5, 7) < 0.4})
    if make == "compact":
        ls.compact_(model)
    if make == "packed":
        ls.pack_(model, report=None)
    model.to(here)
    with torch.no_grad(), pytest.raises((ValueError, RuntimeError), match=elsewhere):
        model(torch.randn(2, 7, device=elsewhere))


def test_scores_share_one_device():
    scores, masks = [torch.randn(4), torch.randn(5)], [torch.ones(4).bool(), torch.ones(5).bool()]
    scores[1], masks[1] = scores[1].to("meta"), masks[1].to("meta")
    with pytest.raises(ValueError, match="share one device, got cpu and meta; move"):
        ops.keep_top(scores, masks, 2)


def test_lists_of_another_dtype_are_refused():
    mask = torch.rand(5, 7) < 0.5
    kept, weight = KeptLists.of(mask), torch.randn(5, 7)
    for name in kept._fields:
        wrong = kept._replace(**{name: getattr(kept, name).float()})
        with pytest.raises(ValueError, match=rf"kept.{name} is torch.float32, not torch.int"):
            products.compact_linear(torch.randn(2, 7), weight[mask], wrong, weight)


@pytest.mark.skipif(not dispatch.built("cpu"), reason="the native kernels are not built")
def test_train_step_says_where_it_runs():
    model = ls.compact_(ls.sparsify_(nn.Sequential(nn.Linear(7, 5))))
    step = ls.train_step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    x, y = torch.randn(3, 7), torch.zeros(3, dtype=torch.int64)
    for args in ((x.to("meta"), y), (x, y.to("meta"))):
        with pytest.raises(ValueError, match=r"meta.*, but train_step runs on the CPU; move"):
            step(*args)


# ---- GPUs that Triton cannot use -----------------------------------------------------------------


@pytest.fixture
def triton_backend(monkeypatch):
    """The backend "triton", compiled for a GPU that is there as far as torch.cuda says."""
    pytest.importorskip("triton")
    from lottery_sparse.ops.triton import limits

    monkeypatch.setattr(limits, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(torch, "empty", lambda *size, **options: torch.zeros(size))
    caches = limits.fails_on, dispatch.fits
    for cached in caches:
        cached.cache_clear()
    yield limits
    for cached in caches:
        cached.cache_clear()


class Launch:
    """A kernel whose launch fails."""

    def __init__(self, error):
        self.error = error

    def __getitem__(self, grid):
        def launch(*args):
            if self.error is not None:
                raise self.error

        return launch


PACK = (torch.ones(3, 4, dtype=torch.bool),)


def assert_left_out(match, caplog):
    with ls.use_backend("triton"), pytest.raises(RuntimeError, match=f"backend triton: .*{match}"):
        dispatch.kernel("pack_mask", CUDA, PACK)
    for _ in range(2):
        assert dispatch.kernel("pack_mask", CUDA, PACK) is reference.pack_mask
    (record,) = caplog.records
    assert "does without its triton kernels on cuda:0" in record.getMessage()


def test_an_old_gpu_is_left_to_the_reference_and_said_once(triton_backend, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert_left_out("8.0 and newer, and cuda:0 has 7.5", caplog)


def test_a_launch_that_fails_is_reported_with_its_reason(triton_backend, monkeypatch, caplog):
    error = RuntimeError("Triton Error [CUDA]: device kernel image is invalid")
    monkeypatch.setattr(triton_backend, "_touch", Launch(error))
    assert_left_out("kernel image is invalid.*; it needs a C compiler.* driver", caplog)


def test_no_memory_for_the_trial_says_nothing_of_kernels(triton_backend, monkeypatch):
    monkeypatch.setattr(triton_backend, "_touch", Launch(torch.OutOfMemoryError("full")))
    with pytest.raises(torch.OutOfMemoryError):
        dispatch.kernel("pack_mask", CUDA, PACK)
    monkeypatch.setattr(triton_backend, "_touch", Launch(None))
    assert dispatch.kernel("pack_mask", CUDA, PACK).__module__ == "lottery_sparse.ops.bits.triton"


@needs_triton
def test_optimizers_say_why_a_forced_backend_cannot_step(monkeypatch):
    optimizer = ls.optim.SGD([nn.Parameter(torch.ones(3).double())], lr=0.1)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3).double()
    monkeypatch.setattr(dispatch, "unfit", lambda name, device: f"{device} is too old.")
    with ls.use_backend("triton"), pytest.raises(RuntimeError, match="Parameters: cpu is too old"):
        optimizer.step()


# ---- sizes ---------------------------------------------------------------------------------------


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def refused(op, *args):
    """Why the Triton kernel of an op cannot run for its own arguments."""
    return dispatch.function(op, "triton").why_not(*args)


INT, BOOL, LONG = torch.int32, torch.bool, torch.int64
MANY = 2**31
MASK = meta(1, dtype=BOOL)
BEYOND = {
    "rows": (
        "masked_linear",
        (MaskedArgs(meta(4, 8), meta(2**22 + 1, 8), MASK),),
        "up to 4194304 rows",
    ),
    "batch": (
        "masked_linear_backward",
        (MaskedArgs(meta(2**23, 8), meta(8, 8), MASK), meta(2**23, 8), True, True),
        "8388608",
    ),
    "networks": (
        "masked_linear",
        (MaskedArgs(meta(2, 8), meta(65536, 4, 8), MASK),),
        "65535 networks.*got 65536",
    ),
    "kept networks": ("scatter_kept_", (meta(65536, 2, 2), meta(65536, 3)), "65535 networks"),
    "drawn networks": ("sample_bits", (meta(70000, 2, 2), meta(70000, 3, dtype=LONG)), "70000"),
    "a mask": ("pack_mask", (meta(MANY, dtype=BOOL),), "count up to 2147418112 .*got 2147483648"),
    "bits": ("unpack_mask", (meta(2**26, dtype=INT), MANY), "got 2147483648"),
    "values": (
        "csr_linear",
        (CsrArgs(meta(2, 8), meta(MANY), meta(3, dtype=LONG), MASK, None),),
        "got 2147483648",
    ),
    "ternary rows": (
        "ternary_linear",
        (TernaryArgs(meta(2, 8), meta(2**19, 1, 16, dtype=INT), meta(1), None, 2**23, False),),
        "got 8388608",
    ),
    "a kernel": (
        "supermask_conv2d",
        (SupermaskArgs(meta(2, 8), meta(2**17, 2**11, 3, 3), MASK, MASK),),
        "row or network",
    ),
}


@needs_triton
@pytest.mark.parametrize("case", BEYOND)
def test_what_kernels_cannot_count_they_refuse(case):
    op, args, match = BEYOND[case]
    why = refused(op, *args)
    assert re.search(match, why)
    assert why.endswith(".")


@needs_triton
def test_elements_in_all_are_not_the_limit():
    a = MaskedArgs(meta(2**21, 2**12), meta(2**12, 2**12), MASK)
    assert refused("masked_linear", a) is None
    assert refused("pack_mask", meta(2**16, 2**16, dtype=BOOL)) is None
    assert refused("keep_top", [meta(2**33)], [meta(2**33, dtype=BOOL)], 1, 0, [0]) is None


def test_lists_count_up_to_32_bits():
    with pytest.raises(ValueError, match=r"2147483648 slots is too large for lists.*split"):
        KeptLists.of(torch.ones(2, 3).bool(), capacity=2**31)
