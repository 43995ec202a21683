"""Whether this process computes what a run's config says, and whose bits its checkpoints hold.

A run's products, and the order in which its own kernels sum, are literals of its config (`Run`).
The bits of dense products belong to a library and a machine, which no config can ask for: what a
chain goes on from says which they were, so that no chain is made by two.
"""

import os
import warnings
from functools import cache, partial
from typing import Any

import torch
from torch.nn import functional as F

from experiments.store.machine import blas, cpu_model, numerics
from experiments.study.runs import Limits, Run
from experiments.timing import least
from lottery_sparse.ops import dispatch, limits
from lottery_sparse.ops.common.eager import has_node

REPETITIONS = 7  # of a timed convolution
BUILD = "build the kernels by `python -m lottery_sparse build`"


class OtherArithmetic(ValueError):
    """What is asked of this process is not what it computes."""


def check(run: Run, device: str) -> None:
    """Refuse a run whose config says other arithmetic than this process has.

    Raises:
        OtherArithmetic: a sentence with the way out.
    """
    if name := dispatch.forced():
        raise OtherArithmetic(
            f"{run.id} leaves every product to the limits of its config, but the backend {name!r} "
            "is forced: unset LS_BACKEND, leave the use_backend block."
        )
    if device != "cpu":
        return
    if (here := numerics()) != run.numerics:
        raise OtherArithmetic(
            f"{run.id} is of numerics {run.numerics}, but {_why(here)}: {_way_out(here)}, or make "
            f"runs of this arithmetic by --numerics {here}."
        )
    if run.numerics and not has_node():
        raise OtherArithmetic(
            f"{run.id} is of numerics {run.numerics}, but the part of the kernels that is built "
            f"for one torch is not there for {torch.__version__}: {BUILD}."
        )
    if run.numerics and (here := limits_here()) != run.limits:
        raise OtherArithmetic(
            f"{run.id} has the limits of dispatch {dict(run.limits)}, but this version computes by "
            f"{dict(here)}: set LS_MACHINE=0 where the machine was measured, use the version that "
            "has the former, or make the latter values of runs.LITERALS."
        )


def _why(here: int) -> str:
    if here == 0:
        return "the CPU kernels are not built (numerics 0)"
    forced = os.environ.get("LS_CPU")
    return f"the CPU kernels here have numerics {here}" + (f" (LS_CPU={forced})" if forced else "")


def _way_out(here: int) -> str:
    if here == 0:
        return BUILD
    return "unset LS_CPU" if os.environ.get("LS_CPU") else "run it on a CPU with AVX2"


def limits_here() -> Limits:
    """The limits that dispatch goes by here, of those that products of studies meet.

    Not of 1x1 convolutions, bfloat16, layers in the masked form or a few large images.
    """
    linear, conv = (torch.empty(shape, device="meta") for shape in ((1, 1), (1, 1, 3, 3)))
    return (
        ("linear", limits.max_density(linear)),
        ("linear_quick", limits.MAX_DENSITY_QUICK),
        ("linear_values", limits.MAX_DENSITY_SAMPLED),
        ("conv", limits.max_density(conv)),
        ("step", limits.MAX_DENSITY_STEP),
        ("step_values", limits.MAX_DENSITY_STEP_SAMPLED),
    )


# ---- how fast it is ------------------------------------------------------------------------------


def warn_if_slow(run: Run, device: str) -> None:
    """Warn where the precision of a run costs time here; its profile asks for it all the same."""
    if device != "cpu" or run.precision == "float32":
        return
    if (factor := slowdown(run.precision)) > 1:
        warnings.warn(
            f"{run.precision} takes {factor:.1f} times as long as float32 on this processor (a "
            "convolution of 64 channels, one thread, the least of several), and so may runs of "
            f"profile {run.protocol.name}. They are run all the same: the profile alone decides "
            "precision.",
            stacklevel=2,
        )


def slowdown(precision: str) -> float:
    """Times as long as float32: a convolution as in the networks here, forward and backward."""
    last = torch.channels_last
    images = torch.ones(8, 64, 32, 32).contiguous(memory_format=last).requires_grad_()
    weight = torch.ones(64, 64, 3, 3, requires_grad=True)

    def step(lowered: bool) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=lowered):
            y = F.conv2d(images, weight, padding=1)
        y.backward(torch.ones_like(y))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        calls = {name: partial(step, name == "bfloat16") for name in (precision, "float32")}
        seconds = least(calls, REPETITIONS)
    finally:
        torch.set_num_threads(threads)
    return seconds[precision] / seconds["float32"]


# ---- whose bits a checkpoint holds ---------------------------------------------------------------


@cache
def here(device: str) -> str:
    """The arithmetic of dense products in this process, in words: those of one name agree."""
    if device != "cpu":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    libraries = blas()
    names = [f"{name} {libraries[name]}" for name in ("mkl", "onednn") if libraries[name]]
    held = [f"{name}={value}" for name, value in libraries["held"].items()]
    return ", ".join(
        (cpu_model(), f"torch {torch.__version__} ({libraries['isa']})", *names, *held)
    )


def marked(metadata: dict[str, Any], device: str) -> dict[str, Any]:
    """The metadata of a checkpoint, with the arithmetic that made it."""
    return metadata | {"arithmetic": here(device)}


def is_ours(metadata: dict[str, Any], device: str) -> bool:
    """Whether this process can go on from a checkpoint. Old ones say nothing, and are taken."""
    return metadata.get("arithmetic", here(device)) == here(device)
