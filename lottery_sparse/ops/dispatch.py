"""Which implementation of an op runs: one table of backends, one table of preferences.

An op is computed by a function of its name, of the same signature on every backend: its kernel. It
is in the backend's file in the op's folder: ops/masked/cpu.py calls the C++ kernel of
masked_linear, and ops/masked/reference.py defines it. A kernel that does not take every call says
so beside it, by functions of its own arguments:

    @dispatch.limited(why_not=..., is_faster=...)

    why_not(*args)      None if the kernel can run the call, else a sentence that says why not
    is_faster(*args)    whether it is the faster one, where it is listed first

An op of many arguments has a record of them in arguments.py of its folder, which kernels take. The
function of the op's name there makes a kernel's arguments of those of the registered op.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch

_LOG = logging.getLogger("lottery_sparse")


@dataclass(frozen=True)
class Backend:
    # A module, imported on first use, that loads the library of the kernels. If they run on GPUs,
    # it has fails_on(device): None if they run on this one, else a sentence that says why not.
    library: str
    needs: str  # probed with find_spec: absent means skipped; present but broken raises
    devices: tuple[str, ...]  # () = every device


# Triton chooses the interpreter, in which kernels run on the CPU, as they are imported.
_TRITON = ("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)

BACKENDS: dict[str, Backend] = {
    "reference": Backend("torch", needs="torch", devices=()),
    "dense": Backend("torch", needs="torch", devices=()),
    "cpu": Backend("lottery_sparse.ops.common.cpu", needs="lottery_sparse._C", devices=("cpu",)),
    "triton": Backend("lottery_sparse.ops.triton.limits", needs="triton", devices=_TRITON),
    "cuda": Backend(
        "lottery_sparse.ops.common.cuda", needs="lottery_sparse._C_cuda", devices=("cuda",)
    ),
}

# Op -> its folder in ops/, and its part of it. A backend has a part in a file of its own, such as
# masked/triton_conv2d.py, or in the backend's one file there, such as masked/dense.py.
PLACES: dict[str, tuple[str, str]] = {
    "pack_mask": ("bits", ""),
    "unpack_mask": ("bits", ""),
    "select_kept": ("bits", ""),
    "put_back_": ("bits", ""),
    "keep_top": ("selection", ""),
    "random_words": ("random", ""),
    "random_signs": ("random", ""),
    "random_uniform": ("random", ""),
    "random_normal": ("random", ""),
    "masked_linear": ("masked", ""),
    "masked_linear_backward": ("masked", ""),
    "masked_conv2d": ("masked", "conv2d"),
    "masked_conv2d_backward": ("masked", "conv2d"),
    "compact_linear": ("compact", ""),
    "compact_linear_backward": ("compact", ""),
    "compact_conv2d": ("compact", "conv2d"),
    "compact_conv2d_backward": ("compact", "conv2d"),
    "scatter_kept_": ("compact", ""),
    "gather_kept": ("compact", ""),
    "sample_mask": ("supermask", "sampling"),
    "sample_bits": ("supermask", "sampling"),
    "supermask_linear": ("supermask", ""),
    "supermask_linear_backward": ("supermask", ""),
    "supermask_conv2d": ("supermask", "conv2d"),
    "supermask_conv2d_backward": ("supermask", "conv2d"),
    "ternary_linear": ("packed", "ternary"),
    "csr_linear": ("packed", ""),
    "bitmap_linear": ("packed", ""),
    "sgd_step": ("steps", ""),
    "adam_step": ("steps", ""),
    "prepare_step": ("steps", ""),
}

# Device -> op -> backends in order; the first that is built and does not refuse the call runs.
# An op that is not listed runs on "reference". A kernel is listed only where benchmarks/results
# shows that it wins; up to which density, its `is_faster` knows (see benchmarks/README.md).
PREFERENCE: dict[str, dict[str, tuple[str, ...]]] = {
    "cpu": {
        "keep_top": ("cpu", "reference"),
        "pack_mask": ("cpu", "reference"),
        "unpack_mask": ("cpu", "reference"),
        "random_words": ("cpu", "reference"),
        "random_signs": ("cpu", "reference"),
        "random_uniform": ("cpu", "reference"),
        "random_normal": ("cpu", "reference"),
        "masked_linear": ("cpu", "dense"),
        "masked_linear_backward": ("cpu", "dense"),
        "compact_linear": ("cpu", "dense"),
        "compact_linear_backward": ("cpu", "dense"),
        "compact_conv2d": ("cpu", "dense"),
        "compact_conv2d_backward": ("cpu", "dense"),
        "scatter_kept_": ("cpu", "reference"),
        "ternary_linear": ("cpu", "reference"),
        "csr_linear": ("cpu", "reference"),
        "bitmap_linear": ("cpu", "reference"),
        "masked_conv2d": ("dense",),
        "masked_conv2d_backward": ("dense",),
        "sample_bits": ("cpu", "reference"),
        "sample_mask": ("cpu", "reference"),
        "supermask_linear": ("dense",),
        "supermask_linear_backward": ("dense",),
        "supermask_conv2d": ("dense",),
        "supermask_conv2d_backward": ("dense",),
    },
    "cuda": {
        "compact_linear": ("dense", "triton"),
        "compact_linear_backward": ("dense", "triton"),
        "compact_conv2d": ("dense", "triton"),
        "compact_conv2d_backward": ("dense", "triton"),
        "masked_linear": ("dense", "triton"),
        "masked_linear_backward": ("dense", "triton"),
        "sample_bits": ("triton", "reference"),
        "masked_conv2d": ("dense", "triton"),
        "masked_conv2d_backward": ("dense", "triton"),
        "scatter_kept_": ("triton", "reference"),
        "pack_mask": ("triton", "reference"),
        "unpack_mask": ("triton", "reference"),
        "random_words": ("triton", "reference"),
        "random_signs": ("triton", "reference"),
        "random_uniform": ("triton", "reference"),
        "random_normal": ("triton", "reference"),
        "keep_top": ("triton", "reference"),
        "ternary_linear": ("triton", "reference"),
        "csr_linear": ("triton", "reference"),
        "bitmap_linear": ("triton", "reference"),
        "supermask_linear": ("dense", "triton"),
        "supermask_linear_backward": ("dense", "triton"),
        "supermask_conv2d": ("dense", "triton"),
        "supermask_conv2d_backward": ("dense", "triton"),
    },
}


@dataclass(frozen=True, eq=False)
class _Block:
    """One `use_backend` block that has not been left; equal to itself only."""

    backend: str


# What os.environ looks into, and the name as it is there: every op asks, and os.environ itself
# takes four Python calls and an exception to say that a name is not set.
_ENVIRONMENT: dict[Any, Any] = os.environ._data  # pyright: ignore[reportAttributeAccessIssue]
_LS_BACKEND = os.environ.encodekey("LS_BACKEND")

# Process-wide, not per thread: the backward of CUDA tensors runs on threads of autograd's own.
overrides: list[_Block] = []  # the blocks that are open, the one entered last counts


def forced() -> str | None:
    """The backend that `use_backend` or the environment variable LS_BACKEND forces, or None."""
    last = overrides[-1:]  # at once: another thread may leave its block meanwhile
    if last:
        return last[0].backend
    value = _ENVIRONMENT.get(_LS_BACKEND)
    return os.fsdecode(value) if value else None


def prefers_dense(op: str, kind: str) -> bool:
    """Whether the dense library is first choice for an op on a device, and no backend is forced."""
    return forced() is None and PREFERENCE.get(kind, {}).get(op, ("dense",))[0] == "dense"


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the block on one backend, in all threads.

    An op that this backend does not have, or cannot run for the tensors given, raises
    RuntimeError: a forced backend never falls back.

    Of blocks that are open at the same time the one entered last counts, in whatever order they are
    left. That is so for the whole process, as autograd runs a backward on threads of its own: a
    block in one thread, or around an `await` or a `yield`, holds for the other threads and tasks
    that run meanwhile.

    >>> with ls.use_backend("reference"):
    ...     y = model(x)

    Args:
        name: a key of `BACKENDS`: "reference" (plain PyTorch), "dense" (the dense library on the
            effective weight), "cpu" (C++ kernels), "triton" or "cuda" (CUDA kernels).

    Raises:
        ValueError: no such backend.
    """
    _check_name(name)
    block = _Block(name)
    overrides.append(block)
    try:
        yield
    finally:
        overrides.remove(block)


def built(name: str) -> bool:
    """Whether what the backend needs is installed (it may still run on another device only)."""
    return _found(BACKENDS[name].needs)


def available(op: str, device: torch.device | str) -> list[str]:
    """The backends that have `op` for tensors on `device`, on this machine."""
    kind = torch.device(device).type
    return [
        name
        for name, backend in BACKENDS.items()
        if (not backend.devices or kind in backend.devices)
        and built(name)
        and module_of(op, name) is not None
    ]


def numerics() -> int:
    """The number of the bits that this process' own CPU kernels give in float32.

    Processes of one number compute the same bits, on any machine and for any thread count.

        1   every sum in the order of `numerics` 1, products and sums fused: LS_CPU=avx2 and avx512
        -1  the same order, products rounded before they are added: LS_CPU=portable
        0   the kernels are not built: all sums are torch's

    Another order of sums will have another number. The number says nothing of dense products, which
    belong to the library and the machine, nor of bfloat16, whose bits belong to the kernel variant.
    Kernels of integers (masks, selection, randomness, int8 sums) give the same bits under every
    number.

    Raises:
        RuntimeError: LS_CPU names a variant that is unknown or does not run on this machine.
    """
    return library_of("cpu").numerics() if built("cpu") else 0


def library_of(name: str) -> ModuleType:
    """The module that loads the library of a backend's kernels."""
    return _module(BACKENDS[name].library)


def limited(
    why_not: Callable[..., str | None], is_faster: Callable[..., bool] | None = None
) -> Callable[[Callable], Callable]:
    """The decorator of a kernel that does not take every call, or is not always the faster one."""

    def decorate(kernel: Any) -> Any:
        kernel.why_not, kernel.is_faster = why_not, is_faster
        return kernel

    return decorate


@cache
def module_of(op: str, name: str) -> ModuleType | None:
    """The file of a backend that computes an op, imported on first use; None: it does not."""
    if op not in PLACES:
        return None
    library_of(name)
    family, part = PLACES[op]
    for file in (f"{name}_{part}", name) if part else (name,):
        path = f"lottery_sparse.ops.{family}.{file}"
        if _found(path):
            module = importlib.import_module(path)
            if hasattr(module, op):
                return module
    return None


def function(op: str, name: str) -> Callable:
    """The kernel of an op on a backend that has it."""
    return getattr(module_of(op, name), op)


@cache
def arguments_of(op: str) -> Callable[..., tuple] | None:
    """What makes the arguments of an op's kernels of those of the registered op; None: the same."""
    path = f"lottery_sparse.ops.{PLACES[op][0]}.arguments"
    return getattr(_module(path), op, None) if _found(path) else None


def own_arguments(op: str, args: tuple) -> tuple:
    """The arguments of an op's kernels, for those of the registered op."""
    make = arguments_of(op)
    return args if make is None else make(*args)


def unfit(name: str, device: torch.device) -> str | None:
    """Why no kernel of a backend runs on this device, in a sentence; None if they do."""
    fails_on = getattr(library_of(name), "fails_on", None)
    return None if fails_on is None or device.type != "cuda" else fails_on(device)


@cache
def fits(name: str, device: torch.device) -> bool:
    """Whether the kernels of a backend run on this device; if not, says so once."""
    why = unfit(name, device)
    if why is not None:
        _LOG.warning("lottery_sparse does without its %s kernels on %s: %s", name, device, why)
    return why is None


def why_not(name: str, op: str, device: torch.device, args: tuple) -> str | None:
    """Why a backend that has `op` cannot run it for the registered op's arguments; None: it can."""
    return _why_not(name, op, device, own_arguments(op, args))


def _why_not(name: str, op: str, device: torch.device, args: tuple) -> str | None:
    found: Any = function(op, name)
    return unfit(name, device) or (found.why_not(*args) if hasattr(found, "why_not") else None)


def kernel(op: str, device: torch.device, args: tuple = ()) -> Callable:
    """The kernel that computes `op` for `args`, its own arguments, on `device`.

    Raises:
        RuntimeError: the forced backend is not built, lacks the op, or refuses these arguments.
    """
    # every op asks: what needs no Python call here makes none
    if (overrides or _ENVIRONMENT.get(_LS_BACKEND)) and (name := forced()) is not None:
        return _forced_kernel(name, op, device, args)
    for name in PREFERENCE.get(device.type, {}).get(op, ()):
        if not _found(BACKENDS[name].needs):
            _say_not_built(name)
            continue
        if device.type == "cuda" and not fits(name, device):
            continue
        found = getattr(module_of(op, name), op, None)
        if found is None:  # a file that is not there
            continue
        if not hasattr(found, "why_not"):
            return found
        if found.why_not(*args) is None and (found.is_faster is None or found.is_faster(*args)):
            return found
    return function(op, "reference")


def run_on(name: str, op: str, *args: Any) -> Any:
    """What a backend that has `op`, and can run it, computes of the registered op's arguments."""
    return function(op, name)(*own_arguments(op, args))


def _forced_kernel(name: str, op: str, device: torch.device, args: tuple) -> Callable:
    _check_name(name)
    names = available(op, device)
    if name not in names:
        reason = "" if built(name) else f" ({BACKENDS[name].needs} is not installed)"
        raise RuntimeError(
            f"{op} has no {name} backend for {device.type} tensors{reason}; "
            f"available here: {', '.join(names)}."
        )
    why = _why_not(name, op, device, args)
    if why is not None:
        raise RuntimeError(f"{op} cannot run on the forced backend {name}: {why}")
    return function(op, name)


def _check_name(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}.")


_module = cache(importlib.import_module)


@cache
def _found(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@cache
def _say_not_built(name: str) -> None:
    # said once, when the first op would have used it; `doctor` repeats it
    if name == "triton":
        _LOG.warning("lottery_sparse runs without its Triton kernels: pip install triton.")
        return
    _LOG.warning(
        "lottery_sparse runs in pure Python: its %s kernels (%s) are not built. To build them "
        "against the installed torch: pip install --no-build-isolation ., in a checkout.",
        name,
        BACKENDS[name].needs,
    )
