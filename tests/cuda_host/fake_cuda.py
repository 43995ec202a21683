"""A CUDA device for a CPU build of torch (fake_cuda.cpp); `install` changes the process for good.

    python tests/cuda_host/fake_cuda.py FILE|-m MODULE [ARGUMENTS]

runs a program with it. The library must be loaded before torch, so import this module first. What
differs from a GPU: the arithmetic is that of the CPU, no time passes, streams do nothing, and there
are no graphs.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FLAGS = ["-std=c++20", "-O1", "-g0", "-fPIC", "-shared", "-Wall", "-Werror"]


def build() -> Path:
    """The library, in build/: made once for each state of its source and version of torch."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if not compiler:
        raise RuntimeError("no C++ compiler to build fake_cuda.cpp with")
    source = HERE / "fake_cuda.cpp"
    version = importlib.metadata.version("torch")
    sources = b"".join(path.read_bytes() for path in (source, HERE / "fake_cuda_device.h"))
    digest = hashlib.sha256(sources + repr((FLAGS, version)).encode())
    built = ROOT / "build" / f"fake_cuda-{digest.hexdigest()[:12]}.so"
    if not built.exists():
        built.parent.mkdir(exist_ok=True)
        here = Path(importlib.util.find_spec("torch").origin).parent
        beside = built.with_suffix(f".{os.getpid()}.so")
        include = [f"-I{here}/include", f"-I{here}/include/torch/csrc/api/include"]
        link = [f"-L{here}/lib", "-lc10", "-ltorch_cpu", "-ltorch", f"-Wl,-rpath,{here}/lib"]
        command = [compiler, *FLAGS, *include, str(source), "-o", str(beside), *link]
        subprocess.run(command, check=True, timeout=600)
        os.replace(beside, built)
    return built


def load() -> ctypes.CDLL:
    if "torch" in sys.modules:
        raise RuntimeError("torch is loaded already: import fake_cuda before it")
    return ctypes.CDLL(str(build()))


LIBRARY = load()

import types  # noqa: E402

import torch  # noqa: E402


class Stream:
    cuda_stream = 0
    device = torch.device("cuda:0")

    def __init__(self, *args, **options):
        pass

    def synchronize(self):
        pass

    def wait_stream(self, other):
        pass

    wait_event = wait_stream

    def record_event(self, event=None):
        return event or Event()

    def query(self):
        return True


class Event:
    def __init__(self, *args, **options):
        pass

    def record(self, stream=None):
        pass

    wait = record

    def synchronize(self):
        pass

    def query(self):
        return True

    def elapsed_time(self, other):
        return 1.0


class Graph:
    def __init__(self, *args, **options):
        raise NotImplementedError("fake_cuda has no graphs")


PROPERTIES = types.SimpleNamespace(
    name="fake H100", major=9, minor=0, multi_processor_count=132, warp_size=32,
    total_memory=80 << 30, shared_memory_per_block=48 << 10, L2_cache_size=50 << 20,
    shared_memory_per_block_optin=227 << 10, shared_memory_per_multiprocessor=228 << 10,
    max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536, is_integrated=False,
    clock_rate=1980000, memory_clock_rate=2619000, memory_bus_width=5120,
)  # fmt: skip


_to_of_torch = torch.storage._to


def _storage_to(storage, device, non_blocking=False):
    if device.type != "cuda":
        return _to_of_torch(storage, device, non_blocking)
    new = torch.empty(storage.nbytes(), dtype=torch.uint8, device=device).untyped_storage()
    return new.copy_(storage, non_blocking)


def _own(f):
    return lambda *args, **options: f(*args, **options)


def install() -> ctypes.CDLL:
    """Make cuda:0 exist, in this process. Returns the library: its `fake_cuda_synchronised()`
    counts the times that the host waited for the device."""
    LIBRARY.fake_cuda_synchronised.restype = ctypes.c_int64
    LIBRARY.fake_cuda_offset.restype = ctypes.c_int64
    current = Stream()
    nothing = lambda *args, **options: None  # noqa: E731
    zero = lambda *args, **options: 0  # noqa: E731
    replaced = {
        "is_available": lambda: True, "is_initialized": lambda: True, "_lazy_init": nothing,
        "init": nothing, "device_count": lambda: 1, "current_device": zero,
        "set_device": nothing, "synchronize": nothing, "empty_cache": nothing,
        "_exchange_device": zero, "_maybe_exchange_device": zero, "_lazy_call": nothing,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: PROPERTIES.name,
        "get_device_properties": lambda device=None: PROPERTIES,
        "current_stream": lambda device=None: current,
        "default_stream": lambda device=None: current, "set_stream": nothing,
        "stream": lambda stream: contextlib.nullcontext(),
        "is_current_stream_capturing": lambda: False, "is_bf16_supported": lambda *a: True,
        "memory_allocated": zero, "max_memory_allocated": zero, "memory_reserved": zero,
        "max_memory_reserved": zero, "reset_peak_memory_stats": nothing,
        "mem_get_info": lambda device=None: (80 << 30, 80 << 30),
        "get_rng_state": lambda device="cuda": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": nothing, "manual_seed": nothing, "manual_seed_all": nothing,
        "Stream": Stream, "Event": Event, "CUDAGraph": Graph,
    }  # fmt: skip
    for name, value in replaced.items():
        if not isinstance(value, type):  # torch.compile wants different functions
            value = _own(value)
        setattr(torch.cuda, name, value)
    for name in ("get_rng_state", "set_rng_state", "manual_seed", "manual_seed_all"):
        setattr(torch.cuda.random, name, replaced[name])
    torch.storage._to = _storage_to
    torch.UntypedStorage.clone = lambda storage: _storage_to(storage, storage.device)
    torch._C._cuda_getDriverVersion = lambda: 13000
    return LIBRARY


def main() -> None:
    install()
    sys.argv = sys.argv[1:]
    sys.path[:1] = [str(ROOT), str(HERE), str(HERE.parent / "problems")]
    if sys.argv[0] == "-m":
        sys.argv = sys.argv[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
