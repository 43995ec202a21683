"""Which implementation of an op runs: one table of backends, one table of preferences.

An op is computed by a function of its name, of the same signature on every backend. The function
is in the backend's file in the op's folder: ops/masked/cpu.py calls the C++ kernel of
masked_linear, and ops/masked/reference.py defines it. A backend has besides a module of rules for
all of its ops:

    refuses(op, *args)   None if it can run the call, else a sentence that says why not
    wins(op, *args)      whether it should, where it is listed first

and, if it runs on GPUs,

    fails_on(device)     None if its kernels run on this GPU, else a sentence that says why not
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

import torch

_LOG = logging.getLogger("lottery_sparse")


@dataclass(frozen=True)
class Backend:
    rules: str  # module of refuses, wins and fails_on, imported on first use
    needs: str  # probed with find_spec: absent means skipped; present but broken raises
    devices: tuple[str, ...]  # () = every device


# Triton chooses the interpreter, in which kernels run on the CPU, as they are imported.
_TRITON = ("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)

BACKENDS: dict[str, Backend] = {
    "reference": Backend("lottery_sparse.ops.masked.reference", needs="torch", devices=()),
    "dense": Backend("lottery_sparse.ops.masked.dense", needs="torch", devices=()),
    "cpu": Backend("lottery_sparse.ops.common.cpu", needs="lottery_sparse._C", devices=("cpu",)),
    "triton": Backend("lottery_sparse.ops.triton.limits", needs="triton", devices=_TRITON),
    "cuda": Backend(
        "lottery_sparse.ops.packed.cuda", needs="lottery_sparse._C_cuda", devices=("cuda",)
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
# shows that it wins; from which density on, its `wins` knows (see benchmarks/README.md).
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


# Process-wide, not per thread: the backward of CUDA tensors runs on threads of autograd's own.
overrides: list[_Block] = []  # the blocks that are open, the one entered last counts


def forced() -> str | None:
    """The backend that `use_backend` or the environment variable LS_BACKEND forces, or None."""
    last = overrides[-1:]  # at once: another thread may leave its block meanwhile
    return last[0].backend if last else os.environ.get("LS_BACKEND") or None


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
    return rules_of("cpu").numerics() if built("cpu") else 0


def rules_of(name: str) -> ModuleType:
    """The backend's rules; importing them loads the library of its kernels."""
    return importlib.import_module(BACKENDS[name].rules)


@cache
def module_of(op: str, name: str) -> ModuleType | None:
    """The file of a backend that computes an op, imported on first use; None: it does not."""
    if op not in PLACES:
        return None
    rules_of(name)
    family, part = PLACES[op]
    for file in (f"{name}_{part}", name) if part else (name,):
        path = f"lottery_sparse.ops.{family}.{file}"
        if _found(path):
            module = importlib.import_module(path)
            if hasattr(module, op):
                return module
    return None


def function(op: str, name: str) -> Callable:
    """The function that computes an op on a backend that has it."""
    return getattr(module_of(op, name), op)


def unfit(name: str, device: torch.device) -> str | None:
    """Why no kernel of a backend runs on this device, in a sentence; None if they do."""
    fails_on = getattr(rules_of(name), "fails_on", None)
    return None if fails_on is None or device.type != "cuda" else fails_on(device)


@cache
def fits(name: str, device: torch.device) -> bool:
    """Whether the kernels of a backend run on this device; if not, says so once."""
    why = unfit(name, device)
    if why is not None:
        _LOG.warning("lottery_sparse does without its %s kernels on %s: %s", name, device, why)
    return why is None


def kernel(op: str, device: torch.device, args: tuple = ()) -> Callable:
    """The function that computes `op` for `args` on `device`.

    Raises:
        RuntimeError: the forced backend is not built, lacks the op, or refuses these arguments.
    """
    name = forced()
    if name is not None:
        return _forced_kernel(name, op, device, args)
    for name in PREFERENCE.get(device.type, {}).get(op, ()):
        if not built(name):
            _say_not_built(name)
            continue
        if device.type == "cuda" and not fits(name, device):
            continue
        if name == "reference":
            break
        rules = rules_of(name)
        if rules.refuses(op, *args) is None and rules.wins(op, *args):
            return function(op, name)
    return function(op, "reference")


def _forced_kernel(name: str, op: str, device: torch.device, args: tuple) -> Callable:
    _check_name(name)
    names = available(op, device)
    if name not in names:
        reason = "" if built(name) else f" ({BACKENDS[name].needs} is not installed)"
        raise RuntimeError(
            f"{op} has no {name} backend for {device.type} tensors{reason}; "
            f"available here: {', '.join(names)}."
        )
    if name != "reference":
        why = unfit(name, device) or rules_of(name).refuses(op, *args)
        if why is not None:
            raise RuntimeError(f"{op} cannot run on the forced backend {name}: {why}")
    return function(op, name)


def _check_name(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}.")


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
