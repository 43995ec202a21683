"""Gate: every op of every GPU backend against float64, opcheck on the device, a suite to sanitize.

`python -m benchmarks.gpu.gate` is that suite: the small problems once on each backend, as a program
for compute-sanitizer.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.rows import Case, Row
from benchmarks.gpu.timing import Device, Skip, tf32
from lottery_sparse.ops import dispatch
from lottery_sparse.ops.bits import reference as bits_reference
from lottery_sparse.ops.compact import reference as compact_reference
from lottery_sparse.ops.compact.kept import KeptLists
from lottery_sparse.ops.packed import formats
from lottery_sparse.tools import doctor

DTYPES = {
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "tf32": torch.float32,
    "fp16": torch.float16,
}
BACKENDS = ("triton", "cuda", "dense")
# ‖got - float64‖ / ‖float64‖, where operands are given in the dtype and sums are float32
NORM = {"fp32": 1e-5, "tf32": 2e-3, "fp16": 2e-3, "bf16": 1e-2}
WORST = 30  # times that, of the root mean square: no single number may be further off

Problem = Callable[[Device], tuple]


# ---- problems: arguments of the ops, float32 -----------------------------------------------------


def linear(n: int, k: int, batch: int, networks: int = 0, packed: bool = True) -> Problem:
    def make(d: Device) -> tuple:
        lead = (networks,) if networks else ()
        mask = d.mask(*lead, n, k, density=0.1)
        x, w = (d.randn(*shape, dtype=torch.float32) for shape in ((batch, k), (*lead, n, k)))
        bias = d.randn(*lead, n, dtype=torch.float32)
        return x, w, bits_reference.pack_mask(mask) if packed else mask, bias, None, None

    return make


def backward_of(forward: Problem) -> Problem:
    def make(d: Device) -> tuple:
        x, w, mask, *_ = forward(d)
        dy = d.randn(*w.shape[:-2], x.shape[-2], w.shape[-2], dtype=torch.float32)
        return dy, x, w, mask, None, None, True, True

    return make


def compact(n: int, k: int, batch: int, networks: int = 0, density: float = 0.1) -> Problem:
    """(x, values, bias, effective, *lists, zero)"""

    def make(d: Device) -> tuple:
        lead = (networks,) if networks else ()
        mask = d.mask(*lead, n, k, density=density)
        w = d.randn(*lead, n, k, dtype=torch.float32) * mask
        lists = KeptLists.of(mask)
        values = compact_reference.gather_kept(w, lists.starts, lists.columns)
        return d.randn(batch, k, dtype=torch.float32), values, None, w, *lists, True

    return make


def compact_backward_of(forward: Problem) -> Problem:
    def make(d: Device) -> tuple:
        x, values, _, w, *rest = forward(d)
        dy = d.randn(*w.shape[:-2], x.shape[-2], w.shape[-2], dtype=torch.float32)
        return dy, x, values, w, *rest, True, True

    return make


def gather_of(forward: Problem) -> Problem:
    def make(d: Device) -> tuple:
        _, _, _, w, starts, columns, *_ = forward(d)
        return w, starts, columns

    return make


def scatter_of(forward: Problem) -> Problem:
    def make(d: Device) -> tuple:
        _, values, _, w, starts, columns, *_ = forward(d)
        return torch.zeros_like(w), values, starts, columns

    return make


def packed(format: str, n: int, k: int, rows: int, density: float) -> Problem:
    def make(d: Device) -> tuple:
        x, w = d.randn(rows, k, dtype=torch.float32), d.randn(n, k, dtype=torch.float32)
        kept = d.mask(n, k, density=density)
        if format == "ternary":
            codes = formats.pack_ternary(w.sign() * kept)
            return x, codes, torch.full((1,), 0.5, device=w.device), None, n, False
        values, starts, columns = formats.pack_csr(w, kept)
        where = columns if format == "csr" else bits_reference.pack_mask(kept)
        return x, values, starts, where, None

    return make


def learned(n: int, k: int, batch: int) -> Problem:
    def make(d: Device) -> tuple:
        x, score, w = (
            d.randn(*shape, dtype=torch.float32) for shape in ((batch, k), (n, k), (n, k))
        )
        mask = d.mask(n, k, density=0.5)
        return x, score, w, bits_reference.pack_mask(mask), mask.sum(), None, None

    return make


def learned_backward_of(forward: Problem) -> Problem:
    def make(d: Device) -> tuple:
        x, score, w, bits, kept, *_ = forward(d)
        dy = d.randn(x.shape[0], w.shape[0], dtype=torch.float32)
        return dy, x, score, w, bits, kept, None, True, True, True

    return make


def small() -> dict[str, tuple[str, Problem]]:
    """The doctor's case of each op, and compact ones: ragged on purpose."""
    found = {
        f"{op} small": (op, lambda d, op=op: doctor.cases(d.name)[op]) for op in doctor.cases("cpu")
    }
    one, many = compact(33, 65, 7), compact(9, 70, 5, networks=3)
    for name, make in (("small", one), ("small, 3 networks", many)):
        found |= {
            f"compact_linear {name}": ("compact_linear", make),
            f"compact_linear_backward {name}": (
                "compact_linear_backward",
                compact_backward_of(make),
            ),
            f"gather_kept {name}": ("gather_kept", gather_of(make)),
            f"scatter_kept_ {name}": ("scatter_kept_", scatter_of(make)),
        }
    return found


def large() -> dict[str, tuple[str, Problem]]:
    found: dict[str, tuple[str, Problem]] = {}
    shapes = {"4096x4096 B256": (4096, 4096, 256), "1000x3001 B67": (1000, 3001, 67)}
    for name, shape in (shapes | {"45 of 300x784 B60": (300, 784, 60, 45)}).items():
        forward, make = linear(*shape, packed="3001" not in name), compact(*shape)
        found |= {
            f"masked_linear {name}": ("masked_linear", forward),
            f"masked_linear_backward {name}": ("masked_linear_backward", backward_of(forward)),
            f"compact_linear_backward {name}": (
                "compact_linear_backward",
                compact_backward_of(make),
            ),
            f"scatter_kept_ {name}": ("scatter_kept_", scatter_of(make)),
            f"gather_kept {name}": ("gather_kept", gather_of(make)),
        }
    for name, shape in shapes.items():
        forward = learned(*shape)
        found |= {
            f"supermask_linear {name}": ("supermask_linear", forward),
            f"supermask_linear_backward {name}": (
                "supermask_linear_backward",
                learned_backward_of(forward),
            ),
        }
    for rows in (1, 5, 16, 67):
        for format, density in (("ternary", 0.5), ("csr", 0.05), ("bitmap", 0.5), ("bitmap", 0.1)):
            for n, k in ((11008, 4096), (1000, 3001)):
                name = f"{format}_linear {n}x{k} M{rows} at {density}"
                found[name] = (f"{format}_linear", packed(format, n, k, rows, density))
    return found


# ---- parity --------------------------------------------------------------------------------------


def cast(args: Any, dtype: torch.dtype) -> Any:
    if isinstance(args, Tensor):
        return args.to(dtype) if args.is_floating_point() else args
    return type(args)(cast(a, dtype) for a in args) if isinstance(args, list | tuple) else args


def floating(args: Any) -> bool:
    if isinstance(args, list | tuple):
        return any(map(floating, args))
    return isinstance(args, Tensor) and args.is_floating_point()


WRITTEN = {"scatter_kept_": [0]}  # which arguments


def results(op: str, backend: str, args: tuple) -> list[Tensor]:
    """What an op returns, and the arguments that it writes to, as a list."""
    written = WRITTEN.get(op, [])
    args = tuple(a.clone() if i in written else a for i, a in enumerate(args))
    found = dispatch.run_on(backend, op, *args)
    returned = [] if found is None else list(found) if isinstance(found, list | tuple) else [found]
    return returned + [args[i] for i in written]


@contextmanager
def poisoned() -> Iterator[None]:
    """New memory holds NaN, so that what a kernel forgets to write is seen."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def parity(op: str, backend: str, make: Problem, dtype: str, device: Device) -> Row:
    args = cast(make(device), DTYPES[dtype])
    why = dispatch.why_not(backend, op, torch.device(device.name), args)
    if why is not None:
        raise Skip(f"{backend} refuses: {why}")
    with tf32(dtype == "tf32"), poisoned():
        got = results(op, backend, args)
    exact = results(op, "reference", cast(args, torch.float64))
    errors, worst = [0.0], [0.0]
    for at, (ours, wanted) in enumerate(zip(got, exact, strict=False)):
        if not ours.is_floating_point() or not floating(args):
            same = results(op, "reference", args)[at]  # of the same numbers, so the same bits
            right = torch.equal(ours, same) or torch.allclose(ours, same, 1e-6, 1e-6)
            errors.append(0.0 if right else float("inf"))
        elif wanted.numel() and ours.numel():
            off = ours.double() - wanted
            scale = float(wanted.norm())
            norm = float(off.norm())
            if scale == 0.0:
                errors.append(0.0 if norm == 0.0 else float("inf"))
                continue
            errors.append(norm / scale)
            worst.append(float(off.abs().max()) / scale * wanted.numel() ** 0.5)
    # max of a list that holds NaN depends on the order; a sum does not
    error = max(errors) if sum(errors) == sum(errors) else float("nan")
    far = max(worst) if sum(worst) == sum(worst) else float("nan")
    ok = error <= NORM[dtype] and far <= WORST * NORM[dtype]
    return {
        "ok": ok,
        "error": error,
        "worst": far,
        "summary": f"error {error:.1e}, worst {far:.1e}",
    }


def opcheck(op: str, make: Problem, device: Device) -> Row:
    found = getattr(torch.ops.lottery_sparse, op, None)
    if found is None:
        raise Skip("no registered op")
    args = make(device)
    tests = torch.library.opcheck(found.default, args, raise_exception=False)
    wrong = {name: str(outcome)[:200] for name, outcome in tests.items() if outcome != "SUCCESS"}
    return {"ok": not wrong, "summary": str(wrong) if wrong else f"{len(tests)} checks"}


def offers(backend: str, op: str, kind: str) -> bool:
    """Whether a backend has the op; yes if it does not load, so that its cases say why."""
    found = dispatch.BACKENDS.get(backend)
    if (
        found is None
        or (found.devices and kind not in found.devices)
        or not dispatch.built(backend)
    ):
        return False
    try:
        return dispatch.module_of(op, backend) is not None
    except Exception:
        return True


def cases(dry: bool) -> list[Case]:
    kind = "cpu" if dry else "cuda"
    problems = small() if dry else small() | large()
    found = []
    for dtype in ("fp32", "fp16") if dry else DTYPES:
        for name, (op, make) in problems.items():
            for backend in BACKENDS[:1] if dry else BACKENDS:
                if offers(backend, op, kind):
                    run = partial(parity, op, backend, make, dtype)
                    found.append(Case("gate", "parity", backend, name, run, dtype=dtype))
    for name, (op, make) in small().items():
        if name.endswith(" small"):
            run = partial(opcheck, op, make)
            found.append(Case("gate", "opcheck", op, "small", run, dtype="fp32"))
    return found


def suite() -> int:
    """Each small problem once on each GPU backend; the number of wrong ones."""
    device = Device(not torch.cuda.is_available())
    wrong = count = 0
    for name, (op, make) in small().items():
        for backend in BACKENDS[:2]:
            if not offers(backend, op, device.name):
                continue
            for dtype in ("fp32", "bf16"):
                try:
                    row = parity(op, backend, make, dtype, device)
                except Skip:
                    continue
                count += 1
                wrong += not row["ok"]
                print(name, backend, dtype, row["summary"])
    print(f"{count} calls, {wrong} wrong")
    return wrong


if __name__ == "__main__":
    sys.exit(min(suite(), 1))
