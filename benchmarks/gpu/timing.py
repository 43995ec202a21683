"""How a GPU case is measured: replays of a CUDA graph, peak memory, and the card's ceilings."""

from __future__ import annotations

import gc
import math
import platform
import shutil
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import lottery_sparse as ls
from benchmarks.gpu.rows import Case, Row
from lottery_sparse.tools.doctor import tf32

REPLAYS, SECONDS = 50, 0.25  # at least so many replays, or as many as fit
SHORT = 300.0  # us: shorter calls are captured several times in a graph
BEYOND_CACHE = 150e6  # bytes of weights to go round, so that none is found in L2


class Skip(Exception):
    """Why a case is not measured here."""


@dataclass
class Device:
    """Where cases run. Dry: on the CPU, each call once, nothing timed."""

    dry: bool
    stream: Any = None
    made: dict[Any, Any] = field(default_factory=dict)  # what cases of one weight share

    @property
    def name(self) -> str:
        return "cpu" if self.dry else "cuda"

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = False) -> Tensor:
        return torch.randn(shape, device=self.name).to(dtype).requires_grad_(grad)

    def mask(self, *shape: int, density: float) -> Tensor:
        return torch.rand(shape, device=self.name) < density

    def share(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` returns, made once for the cases that follow each other with one key."""
        if key not in self.made:
            self.made.clear()
            self.made[key] = make()
        return self.made[key]

    def copies(self, size: float) -> int:
        """How many weights of `size` bytes to go round."""
        return 1 if self.dry else max(1, math.ceil(BEYOND_CACHE / max(size, 1)))


@dataclass
class Work:
    """What is timed: `call` makes `calls` of them."""

    call: Callable[[], Any]
    calls: int = 1
    bytes: float = 0.0  # of one, as designed: each read and written once
    flops: float = 0.0
    predicted_us: float | None = None
    weights: int = 0  # peak memory is given per weight
    held: float = 0.0  # bytes of activations, which are not counted as the weight's
    graph: bool = True
    note: str = ""

    def row(self) -> Row:
        fields = {
            "bytes": self.bytes,
            "flops": self.flops,
            "predicted_us": self.predicted_us,
            "note": self.note,
        }
        return {name: value for name, value in fields.items() if value}


def timed(device: Device, make: Callable[[], Work]) -> Row:
    """Median and minimum time of what `make` returns, and its peak memory."""
    if device.dry:
        work = make()
        work.call()
        return work.row() | {"ok": True, "summary": "called once"}
    gc.collect()
    torch.cuda.empty_cache()
    with torch.cuda.stream(device.stream):
        before = torch.cuda.memory_allocated()
        work = make()
        for _ in range(3):
            work.call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        work.call()
        torch.cuda.synchronize()
        row = work.row()
        if work.weights:
            peak = torch.cuda.max_memory_allocated() - before - work.held
            row |= {"peak_bytes": peak, "peak_per_weight": round(peak / work.weights, 3)}
        eager = _times(work.call, 5)
        row["eager_us"] = round(statistics.median(eager) / work.calls, 3)
        if not work.graph:
            return row | _summary(_times(work.call, REPLAYS), work.calls) | {"mode": "eager"}
        repeats = max(1, min(32, math.ceil(SHORT / min(eager))))
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=device.stream):
                for _ in range(repeats):
                    work.call()
        except Exception as error:  # some contenders cannot be captured: their eager time, then
            torch.cuda.synchronize()
            times = _summary(_times(work.call, REPLAYS), work.calls)
            return row | times | {"mode": "eager", "no_graph": str(error)[:300]}
        for _ in range(3):
            graph.replay()
        once = min(_times(graph.replay, 3))
        count = max(REPLAYS, min(1000, int(SECONDS * 1e6 / max(once, 1.0))))
        row |= _summary(_times(graph.replay, count), work.calls * repeats) | {"mode": "graph"}
        graph.reset()
    return row


def _times(call: Callable[[], Any], count: int) -> list[float]:
    """Microseconds of each of `count` calls, by events on the current stream."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) * 1e3 for a, b in pairwise(events)]


def _summary(times: list[float], calls: int) -> Row:
    return {
        "us": round(statistics.median(times) / calls, 3),
        "min_us": round(min(times) / calls, 3),
        "rounds": len(times),
    }


def within(backend: str | None, call: Callable[[], Any]) -> Callable[[], Any]:
    """`call` on a forced backend; None = on those of our own choice."""
    if backend is None:
        return call

    def run() -> Any:
        with ls.use_backend(backend):
            return call()

    return run


# ---- what the numbers depend on ------------------------------------------------------------------


def environment(device: Device) -> Row:
    import triton

    found: Row = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
    }
    if device.dry:
        return found | {"gpu": "none: dry run in Triton's interpreter"}
    properties = torch.cuda.get_device_properties(0)
    found |= {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "memory_bytes": properties.total_memory,
        "cudnn": torch.backends.cudnn.version(),
    }
    names = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw"
    if shutil.which("nvidia-smi"):
        said = subprocess.run(
            ["nvidia-smi", f"--query-gpu={names}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
        ).stdout.strip()
        found |= dict(zip(names.split(","), said.split(", "), strict=False))
    return found


def ceilings(dry: bool) -> list[Case]:
    """What the card does at best: a large copy, and large products."""
    n, elements = (64, 1 << 10) if dry else (8192, 1 << 30)

    def copy(device: Device) -> Row:
        def make() -> Work:
            source = device.randn(elements)
            target = torch.empty_like(source)
            return Work(lambda: target.copy_(source), bytes=4 * elements)

        return timed(device, make)

    def product(dtype: torch.dtype, allowed: bool) -> Callable[[Device], Row]:
        def run(device: Device) -> Row:
            def make() -> Work:
                a, b = (device.randn(n, n, dtype=dtype) for _ in "ab")
                out = torch.empty_like(a)
                return Work(lambda: torch.mm(a, b, out=out), flops=2 * n**3)

            with tf32(allowed):
                return timed(device, make)

        return run

    dtypes = {
        "bf16": (torch.bfloat16, False),
        "tf32": (torch.float32, True),
        "fp32": (torch.float32, False),
    }
    cases = [Case("ceilings", "rate", "torch", "copy", copy)]
    return cases + [
        Case("ceilings", "rate", "torch", f"product {name}", product(*pair), dtype=name)
        for name, pair in dtypes.items()
    ]
