"""`python -m lottery_sparse doctor [--json]`: what is installed, which kernels are built, which
backend each op takes and why, and whether results are right on this machine: every backend beside
the reference, every optimizer beside torch's, torch's own bfloat16 convolutions beside float64.

The report holds versions, flags and verdicts, no paths and no other environment variables, so it
can be pasted into an issue.
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import importlib.util
import math
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise, takewhile
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lottery_sparse
from lottery_sparse import measurements
from lottery_sparse.nn.forms.convert import set_masks_
from lottery_sparse.nn.forms.densify import dense_state_dict
from lottery_sparse.nn.forms.verbs import compact_, sparsify_
from lottery_sparse.ops import dispatch, limits
from lottery_sparse.ops.bits.reference import pack_mask
from lottery_sparse.ops.common.eager import node_module
from lottery_sparse.ops.compact.kept import KeptLists
from lottery_sparse.ops.packed import formats
from lottery_sparse.ops.random.reference import random_uniform
from lottery_sparse.optim import optimizers
from lottery_sparse.optim.train_step import train_step
from lottery_sparse.planning.rate import measure_once

# How to get the kernels, one sentence for every place that says they are missing (design D17).
HOW_TO_BUILD = (
    "run `make venv`, `python -m lottery_sparse build` or `pip install --no-build-isolation .` in "
    "a checkout, with a C++ compiler, against the installed torch"
)

# variable -> what it does; its value is shown unless it may name a folder of the user
SWITCHES = {
    "LS_BACKEND": "forces one backend for every op",
    "LS_CPU": "forces the instruction set of the CPU kernels",
    "LS_MACHINE": "0: limits of dispatch as the code has them; nothing is measured",
    "LS_BUILD": "auto, 0 or require: whether setup.py builds the kernels",
    "LS_DATA_DIR": "where the experiments find MNIST and CIFAR-10",
}
PRIVATE = {"LS_DATA_DIR"}

FAILED = "FAILED"  # a verdict is "ok", or begins with this, or says why nothing was tried
TOLERANCE = 1e-4  # of sums of at most 300 products of order one, added in another order


def report() -> dict[str, Any]:
    """Everything the doctor knows, as plain data.

    `healthy` is False when something that is installed does not work: kernels that do not load, a
    switch that cannot be followed, a backend that disagrees with the reference.
    """
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    native = {name: _native(name) for name in ("_C", "_host", "_C_cuda", _node())}
    ops = {d: {op: _diagnose(op, d, args) for op, args in cases(d).items()} for d in devices}
    found_steps = {device: steps(device) for device in devices}
    diagnoses = [found for by_op in ops.values() for found in by_op.values()]
    verdicts = [v for found in diagnoses for v in found["check"].values()]
    verdicts += [v for by_name in found_steps.values() for v in by_name.values()]
    healthy = (
        not any(part["error"] for part in native.values())
        and all(found["backend"] for found in diagnoses)
        and not any(verdict.startswith(FAILED) for verdict in verdicts)
    )
    return {
        "versions": _versions(),
        "machine": _machine(),
        "limits": _limits(),
        "native": native,
        "wrong_bfloat16_convolutions_of_torch": wrong_convolutions(),
        "switches": {name: _switch(name) for name in SWITCHES},
        "ops": ops,
        "steps": found_steps,
        "healthy": healthy,
    }


def as_text(report: dict[str, Any]) -> str:
    """The report for people: what is here, then one line per op."""
    versions = [f"{name} {version or '-'}" for name, version in report["versions"].items()]
    machine = report["machine"]
    gpus = ", ".join(machine["gpus"]) or "no GPU"
    lines = [
        f"versions   {' · '.join(versions)}",
        f"machine    {machine['system']}, {machine['cores']} cores, "
        f"{machine['torch_threads']} torch threads, torch uses {machine['torch_cpu']}, {gpus}",
        f"limits     {limits_line(report['limits'])}",
        f"torch      {convolutions_line(report['wrong_bfloat16_convolutions_of_torch'])}",
        f"native     {native_line()}",
        f"cuda       {cuda_line()}",
        f"switches   {' · '.join(f'{k}={v or chr(45)}' for k, v in report['switches'].items())}",
    ]
    for device, ops in report["ops"].items():
        lines.append(f"ops on {device}")
        for op, found in ops.items():
            checks = ", ".join(f"{name} {verdict}" for name, verdict in found["check"].items())
            checks = f"  [{checks}]" if checks else ""
            lines.append(f"  {op:25} {found['backend'] or 'none':10} {found['why']}{checks}")
    for device, verdicts in report["steps"].items():
        lines.append(f"steps on {device}, beside torch's optimizers")
        lines += [f"  {name:25} {verdict}" for name, verdict in verdicts.items()]
    lines.append("healthy" if report["healthy"] else "NOT healthy: see the lines above")
    return "\n".join(lines)


# ---- what is installed -------------------------------------------------------------------------


def native_line() -> str:
    """One sentence: are the compiled kernels here, and if not, why and how to get them."""
    kernels, host = _native("_C"), _native("_host")
    if error := kernels["error"] or host["error"]:
        return f"lottery_sparse has native kernels, but they do not work: {error}"
    if kernels["state"] == "missing":
        return f"lottery_sparse is pure Python here; to build its kernels, {HOW_TO_BUILD}."
    if host["state"] == "missing":
        return "lottery_sparse has its native kernels, but not _host, so their build is unknown."
    info = host["info"]
    built = f"lottery_sparse has its native kernels: {info['cpu_variant']}, {info['compiler']}"
    node = _native(_node())
    if node["state"] == "built":
        return f"{built}."
    missing = f"is not built for torch {torch.__version__}; {HOW_TO_BUILD}."
    why = f"does not work: {node['error']}" if node["error"] else missing
    return f"{built}; but the C++ node that makes compact layers quick {why}"


def cuda_line() -> str:
    """One sentence: are the CUDA kernels here, and if not, why."""
    found = _native("_C_cuda")
    if found["error"]:
        return f"lottery_sparse has CUDA kernels, but they do not work: {found['error']}"
    if found["state"] == "missing":
        why = "" if torch.version.cuda else f"; torch {torch.__version__} is no CUDA build"
        return f"no CUDA kernels: they are built where nvcc and a CUDA build of torch are{why}."
    return f"CUDA kernels for {found['info']['architectures']}."


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {
        "lottery_sparse": lottery_sparse.__version__,
        "python": platform.python_version(),
    }
    for name in ("torch", "numpy", "safetensors", "triton"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _machine() -> dict[str, Any]:
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "torch_cpu": torch.backends.cpu.get_cpu_capability(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _limits() -> dict[str, float | None]:
    """The rate that limits of dispatch scale with, and their scale in this process."""
    measure_once()
    return {"dense_over_kernels": measurements.dense_rate(), "scale": limits.SCALE}


def limits_line(found: dict[str, float | None]) -> str:
    """One sentence: how fast the dense library is here, and what that does to densities."""
    rate, scale = found["dense_over_kernels"], found["scale"]
    if rate is None:
        return "densities of dispatch are those of Zen 4: no rate is known of this machine."
    coming = limits.scale_of(rate)
    later = "" if coming == scale else f", and by {coming:.2f} from the next process on"
    return (
        f"dense products are {rate:.2f} times as fast as the kernels here ({limits.MEASURED_AT} on "
        f"Zen 4): densities of dispatch scale by {scale:.2f}{later}."
    )


def _switch(name: str) -> str | None:
    value = os.environ.get(name)
    return "set" if value and name in PRIVATE else value


def _node() -> str:
    return node_module().rpartition(".")[2]


def _native(name: str) -> dict[str, Any]:
    """state: built, missing or broken; error: what the loader or the module said when broken."""
    found: dict[str, Any] = {"state": "missing", "error": None}
    if importlib.util.find_spec(f"lottery_sparse.{name}") is None:
        return found
    try:
        module = importlib.import_module(f"lottery_sparse.{name}")
        if name == "_host":
            found["info"] = module.build_info() | {"cpu_variant": module.cpu_variant()}
        if name == "_C":
            found["info"] = {"numerics": dispatch.numerics()}
        if name == "_C_cuda":
            found["info"] = {"architectures": module.architectures}
    except (ImportError, RuntimeError) as error:
        remedy = f" To build them anew, {HOW_TO_BUILD}." if isinstance(error, ImportError) else ""
        return {"state": "broken", "error": f"{error}{remedy}"}
    return found | {"state": "built"}


# ---- which backend, why, and whether it is right -----------------------------------------------


def _diagnose(op: str, device: str, args: tuple) -> dict[str, Any]:
    chosen, why = _choice(op, device, args)
    names = [
        name
        for name, backend in dispatch.BACKENDS.items()
        if name != "reference"
        and dispatch.built(name)
        and (not backend.devices or device in backend.devices)
    ]
    verdicts = {name: _tried(_beside_reference, op, name, device, args) for name in names}
    check = {name: verdict for name, verdict in verdicts.items() if verdict is not None}
    return {"backend": chosen, "why": why, "check": check}


def _choice(op: str, device: str, args: tuple) -> tuple[str | None, str]:
    """The backend that `dispatch.kernel` gives the case, and why."""
    try:
        own = dispatch.own_arguments(op, args)
        module = dispatch.kernel(op, torch.device(device), own).__module__
    except (RuntimeError, ValueError, ImportError) as error:
        return None, str(error)
    chosen = module.rpartition(".")[2].partition("_")[0]  # a file is named by its backend
    if dispatch.forced():
        return chosen, "forced"
    wished = dispatch.PREFERENCE.get(device, {}).get(op, ())
    if not wished:
        return chosen, "no kernel is listed for it"
    passed = [_passed_over(name, op, device, args) for name in takewhile(chosen.__ne__, wished)]
    return chosen, "; ".join(passed) if passed else "first choice"


def _passed_over(name: str, op: str, device: str, args: tuple) -> str:
    if not dispatch.built(name):
        return f"{name} is not built"
    why = dispatch.why_not(name, op, torch.device(device), args)
    return why or f"{name} is not faster at this density"


def _beside_reference(op: str, name: str, device: str, args: tuple) -> str | None:
    """'ok', or why the backend cannot run the case; None if it has no such op."""
    if dispatch.module_of(op, name) is None:
        return None
    if why := dispatch.why_not(name, op, torch.device(device), args):
        return f"cannot run this case: {why}"
    ours, theirs = copy.deepcopy(args), copy.deepcopy(args)  # some ops write to them
    with tf32(False):  # which torch allows in convolutions, and TOLERANCE does not
        got = dispatch.run_on(name, op, *ours)
        expected = dispatch.run_on("reference", op, *theirs)
    if op in ("compact_linear", "compact_conv2d"):  # and what the backend's own backward needs
        got, expected = got[0], expected[0]
    _check((got, *_compared(ours)), (expected, *_compared(theirs)))
    return "ok"


def _compared(args: tuple) -> list[Any]:
    return [a for a in args if not isinstance(a, torch.device)]


def _check(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=TOLERANCE, atol=TOLERANCE)


def _tried(check: Callable[..., str | None], *args: Any) -> Any:
    """The verdict of a check, or "FAILED: " and what it raised."""
    try:
        return check(*args)
    except Exception as error:  # a self-check reports whatever goes wrong, it must not stop at it
        return f"{FAILED}: {' '.join(str(error).split())}"


# ---- one small problem per op ------------------------------------------------------------------


def cases(device: str) -> dict[str, tuple]:
    """Op -> arguments of a small problem on a device, those of the registered op; ragged on
    purpose. Only references make them, so a kernel that does not load cannot stop the doctor.
    """
    x, dy, bias = _values(7, 65, stream=2), _values(7, 33, stream=4), _values(33, stream=3)
    w, mask = _values(33, 65, stream=1), _mask(33, 65)
    codes = formats.pack_ternary(torch.where(mask, w.sign(), 0.0))
    values, starts, columns = formats.pack_csr(w, mask)
    scores = [w, torch.zeros(50)]  # the second layer is all ties
    candidates = [mask, torch.ones(50, dtype=torch.bool)]
    draw = w * 4, torch.tensor([0, 1, 2])

    maps, dmaps = _values(2, 3, 6, 6, stream=5), _values(2, 4, 6, 6, stream=8)
    f, f_mask, f_bias = _values(4, 3, 3, 3, stream=6), _mask(4, 3, 3, 3), _values(4, stream=7)
    conv = [1, 1], [1, 1], [1, 1], 1  # stride, padding, dilation, groups

    kept, *compact = _compact(w, mask)
    f_kept, *f_compact = _compact(f, f_mask)
    learned, f_learned = _learned(w, mask), _learned(f, f_mask)
    random = 1001, 0, 1, 2
    where = torch.device(device)
    found = {
        "masked_linear": (x, w, mask, bias, None, None),
        "masked_linear_backward": (dy, x, w, mask, None, None, True, True),
        "masked_conv2d": (maps, f, f_mask, f_bias, None, None, *conv),
        "masked_conv2d_backward": (dmaps, maps, f, f_mask, None, None, *conv, True, True),
        "compact_linear": (x, kept, bias, *compact),
        "compact_linear_backward": (dy, x, kept, *compact, True, True),
        "compact_conv2d": (maps, f_kept, f_bias, *f_compact, *conv),
        "compact_conv2d_backward": (dmaps, maps, f_kept, *f_compact, *conv, True, True),
        "scatter_kept_": (torch.zeros_like(w), kept, *compact[1:3]),
        "ternary_linear": (x, codes, torch.full((1,), 0.5), None, 33, False),
        "csr_linear": (x, values, starts, columns, None),
        "bitmap_linear": (x, values, starts, pack_mask(mask), None),
        "keep_top": (scores, candidates, 200, 0, [1, 2]),
        "pack_mask": (mask,),
        "unpack_mask": (pack_mask(mask), 65),
        "sample_mask": draw,
        "sample_bits": draw,
        "supermask_linear": (x, *learned, bias, None),
        "supermask_linear_backward": (dy, x, *learned, None, True, True, True),
        "supermask_conv2d": (maps, *f_learned, f_bias, None, *conv),
        "supermask_conv2d_backward": (dmaps, maps, *f_learned, None, *conv, True, True, True),
        "random_words": (*random, where),
        "random_signs": (*random, where),
        "random_uniform": (*random, where),
        "random_normal": (*random, torch.arange(2**15, dtype=torch.int32), where),
    }
    return {op: tuple(_to(device, a) for a in args) for op, args in found.items()}


def _compact(w: Tensor, mask: Tensor) -> tuple:
    """Kept values, effective weight, lists of kept entries, and that pruned weights are zero."""
    return w[mask], torch.where(mask, w, 0.0), *KeptLists.of(mask.flatten(1)), True


def _learned(w: Tensor, mask: Tensor) -> tuple:
    """Score, weight, bits and count of a learned mask."""
    return _values(*w.shape, stream=10) * 4, w, pack_mask(mask.flatten(1)), mask.sum()


def _values(*shape: int, stream: int) -> Tensor:
    """In [-1, 1)."""
    return _uniform(*shape, stream=stream) * 2 - 1


def _mask(*shape: int) -> Tensor:
    return _uniform(*shape, stream=9) < 0.2


def _uniform(*shape: int, stream: int) -> Tensor:
    return random_uniform(math.prod(shape), 0, stream, 0).view(shape)


def _to(device: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_to(device, v) for v in value]
    return value.to(device) if isinstance(value, Tensor) else value


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether float32 products and convolutions run on TF32: torch's, and those of our kernels."""
    held = [switch.fp32_precision == "tf32" for switch in _tf32_switches()]
    _allow_tf32([allowed] * len(held))
    try:
        yield
    finally:
        _allow_tf32(held)


def _tf32_switches() -> tuple[Any, ...]:
    others: Any = torch.backends.cudnn  # pyright does not see its `conv`
    return torch.backends.cuda.matmul, others.conv, others.rnn


def _allow_tf32(each: list[bool]) -> None:
    # torch.compile reads `allow_tf32`, which raises where only `fp32_precision` was set; and False
    # there leaves convolutions to `torch.backends.fp32_precision`
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, _ = each
    for switch, allowed in zip(_tf32_switches(), each, strict=True):
        switch.fp32_precision = "tf32" if allowed else "ieee"


# ---- a few steps of a small network, beside torch's optimizers ---------------------------------

# name -> ours, torch's, and the options of both
OPTIMIZERS: dict[str, tuple[Callable[..., Any], Callable[..., Any], dict[str, Any]]] = {
    "SGD": (optimizers.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "Adam": (optimizers.Adam, torch.optim.Adam, {"lr": 0.01}),
    "AdamW": (optimizers.AdamW, torch.optim.AdamW, {"lr": 0.01}),
}
SIZES = 65, 33, 10


def steps(device: str) -> dict[str, str]:
    """Optimizer, or train_step with it where it runs -> "ok" or "FAILED: " and what is wrong."""
    ways: dict[str, Callable[..., Callable[..., Any]]] = {"optim.": _by_modules}
    if device == "cpu" and dispatch.built("cpu") and dispatch.forced() in (None, "cpu"):
        ways["train_step, "] = train_step
    return {
        f"{prefix}{name}": _tried(_beside_torch, name, device, way)
        for prefix, way in ways.items()
        for name in OPTIMIZERS
    }


def _beside_torch(name: str, device: str, way: Callable[..., Callable[..., Any]]) -> str:
    ours, theirs, options = OPTIMIZERS[name]
    compact, plain = compact_(_network(device)), _network(device)
    take_ours = way(compact, ours(compact.parameters(), **options))
    take_theirs = _by_modules(plain, theirs(plain.parameters(), **options))
    x = _values(7, SIZES[0], stream=5).to(device)
    y = (torch.arange(7) % SIZES[-1]).to(device)
    for _ in range(3):
        take_ours(x, y)
        take_theirs(x, y)
    _check(dense_state_dict(compact), dense_state_dict(plain))
    return "ok"


def _by_modules(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[..., Any]:
    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def _network(device: str) -> nn.Module:
    """The same every time: masked layers whose pruned weights hold zero."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(SIZES):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    with torch.no_grad():
        for stream, parameter in enumerate(model.parameters()):
            parameter.copy_(_values(*parameter.shape, stream=stream))
    weights = {name: p.detach() for name, p in model.named_parameters() if p.dim() == 2}
    masks = {name: weight.abs() > 0.8 for name, weight in weights.items()}
    return set_masks_(sparsify_(model), masks).to(device)


# ---- torch's own convolutions ------------------------------------------------------------------

# oneDNN's kernel for AMX returns numbers far off where an output is one pixel wide and the stride
# is more than one (https://github.com/pytorch/pytorch/issues/169688, open with torch 2.13). Layers
# that take the dense library pass these numbers on. Shape of x, shape of the weight, options:
CONVOLUTIONS: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ((17, 1, 25, 6), (7, 1, 5, 3), {"stride": (3, 2), "dilation": (1, 2)}),
    ((2, 3, 9, 5), (4, 3, 3, 3), {"stride": 3}),
    ((3, 16, 5, 5), (8, 16, 3, 3), {"stride": 3}),
]


def wrong_convolutions() -> list[str]:
    """Those of CONVOLUTIONS that F.conv2d gets wrong in bfloat16, by more than rounding."""
    generator, wrong = torch.Generator().manual_seed(0), []
    for x_shape, w_shape, options in CONVOLUTIONS:
        x, w = (torch.randn(s, generator=generator).bfloat16() for s in (x_shape, w_shape))
        expected = F.conv2d(x.double(), w.double(), **options)
        size = F.conv2d(x.double().abs(), w.double().abs(), **options)
        error = (F.conv2d(x, w, **options).double() - expected).abs()
        if not (error <= 2 * torch.finfo(x.dtype).eps * size).all():  # NaN is wrong, too
            wrong.append(f"x {x_shape}, weight {w_shape}, {options}")
    return wrong


def convolutions_line(wrong: list[str]) -> str:
    """One sentence on what `wrong_convolutions` found."""
    if not wrong:
        return "its own bfloat16 convolutions are right here"
    return (
        f"its own bfloat16 convolutions are WRONG here for some strides, and so are layers that "
        f"take them ({len(wrong)} of {len(CONVOLUTIONS)} tried, pytorch issue 169688); use "
        "float32, or torch.backends.mkldnn.flags(enabled=False)"
    )
