"""Compiles every Triton kernel for sm_80 and sm_90 without a GPU, and looks at what came out.

`python -m benchmarks.compile.gate` writes results/compile.json, one row for each case, kernel
and architecture: registers, bytes of stack (spills), shared memory, instructions. Rows whose
source has not changed are kept, so a second run takes seconds. It fails on spills, on more memory
than a block has, and where a matrix product does not use the matrix unit it should.

A case is a call of a backend function with tensors on the meta device: what is compiled, and for
which alignments, is what that call would launch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

# Until Triton 3.9 the default, from 3.10 on not: a multiply and an add become one FMA.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

RESULTS = Path(__file__).resolve().parents[1] / "results" / "compile.json"
SHARED = {80: 163 << 10, 90: 227 << 10}  # bytes a block can have
MATRIX = {80: "HMMA", 90: "HGMMA"}  # what a product of 16-bit numbers should run on
COUNTED = ("HGMMA", "HMMA", "FFMA", "LDG", "LDGSTS", "LDS", "STS", "LOP3", "SHF", "IMAD", "BAR")
TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.bool: "i1",
    torch.uint8: "u8", torch.int8: "i8", torch.int16: "i16", torch.int32: "i32",
    torch.int64: "i64",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One kernel of a case, as it would be launched."""

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]  # num_warps, num_stages

    def compiled(self, arch: int) -> Any:
        signature, constants, attributes = {}, {}, {}
        for i, (name, (kind, aligned)) in enumerate(self.types().items()):
            signature[name] = kind
            if kind == "constexpr":
                constants[name] = self.arguments[name]
            elif aligned:
                attributes[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, attributes)
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=self.options)

    def types(self) -> dict[str, tuple[str, bool]]:
        """Of each argument its type, and whether 16 is known to divide it."""
        parameters = {p.name: p for p in self.kernel.params}
        return {
            name: _specialized(
                parameters[name].is_constexpr, value, not parameters[name].do_not_specialize
            )
            for name, value in self.arguments.items()
        }

    def fingerprint(self, arch: int) -> str:
        """Changes with the source of the kernel and of what it calls, and with the arguments."""
        arguments = {
            name: (kind, None if isinstance(self.arguments[name], Tensor) else self.arguments[name])
            for name, kind in self.types().items()
        }
        parts = self.kernel.cache_key, arguments, self.options, arch, triton.__version__
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _specialized(constexpr: bool, value: Any, numbers: bool = True) -> tuple[str, bool]:
    """Type of an argument, and whether 16 divides it, as Triton would specialize it."""
    if constexpr or value is None or (numbers and type(value) is int and value == 1):
        return "constexpr", False
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}", True  # torch aligns what it allocates
    if isinstance(value, bool):
        return "i1", False
    if isinstance(value, int):
        return ("i32" if -(2**31) <= value < 2**31 else "i64"), numbers and value % 16 == 0
    return "fp32", False


def launches(call: Callable[[], Any]) -> list[Launch]:
    """What a call launches."""
    found: list[Launch] = []

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        named = dict(zip(self.arg_names, args, strict=False))
        options = {k: v for k, v in kwargs.items() if k in ("num_warps", "num_stages")}
        named |= {k: v for k, v in kwargs.items() if k in self.arg_names}
        ordered = {name: named[name] for name in self.arg_names}
        found.append(Launch(self, grid(ordered) if callable(grid) else grid, ordered, options))

    with mock.patch.object(JITFunction, "run", record):
        call()
    return found


def rows(chosen: str) -> Iterator[tuple[str, int, Launch]]:
    """(name, architecture, launch) of the cases whose name holds `chosen`."""
    from benchmarks.compile.cases import CASES

    for case, call in CASES.items():
        if chosen in case:
            for i, launch in enumerate(launches(call)):
                for arch in SHARED:
                    yield f"{case} / {i} {launch.kernel.__name__}", arch, launch


def measure(launch: Launch, arch: int) -> dict[str, Any]:
    compiled = launch.compiled(arch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = _cuobjdump("-res-usage", file.name), _cuobjdump("-sass", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)", sass)
    return {
        "source": launch.fingerprint(arch),
        "triton": triton.__version__,
        "grid": list(launch.grid),
        "registers": int(found[1]),
        "stack": int(found[2]),
        "shared": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        "instructions": len(names),
        "counts": {name: names.count(name) for name in COUNTED if name in names},
    }


def _cuobjdump(*arguments: str) -> str:
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    done = subprocess.run([folder / "cuobjdump", *arguments], capture_output=True, text=True)
    return done.stdout + done.stderr


def faults(name: str, arch: int, row: dict[str, Any]) -> list[str]:
    """What is wrong with a row, in sentences."""
    found = []
    if row["stack"]:
        found.append(f"spills {row['stack']} bytes")
    if row["shared"] > SHARED[arch]:
        found.append(f"needs {row['shared']} bytes of shared memory, sm_{arch} has {SHARED[arch]}")
    if any(
        size > limit for size, limit in zip(row["grid"], (2**31 - 1, 65535, 65535), strict=False)
    ):
        found.append(f"its grid {row['grid']} is too large")
    product = "product" in name and "fp32" not in name
    product = product and not name.endswith(("_finish", "_order", "conv_arrange"))
    if product and not row["counts"].get(MATRIX[arch]):
        found.append(f"its products do not run on {MATRIX[arch]}")
    return [f"{name}, sm_{arch}: {fault}." for fault in found]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile.gate", description=__doc__)
    parser.add_argument("-k", default="", metavar="TEXT", help="only cases whose name holds TEXT")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="the JSON file to bring up to date"
    )
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET is 1, which compiles nothing; unset it.")
    held = json.loads(options.out.read_text()) if options.out.exists() else {}
    wrong, seen = [], set()
    for name, arch, launch in rows(options.k):
        key = f"{name}, sm_{arch}"
        seen.add(key)
        if held.get(key, {}).get("source") != launch.fingerprint(arch):
            held[key] = measure(launch, arch)
            print(key, {k: v for k, v in held[key].items() if k not in ("source", "triton")})
            _write(options.out, held)
        wrong += faults(name, arch, held[key])
    if not options.k:
        _write(options.out, {key: row for key, row in held.items() if key in seen})
    print(*wrong, f"{len(seen)} kernels, {len(wrong)} faults", sep="\n")
    return 1 if wrong else 0


def _write(path: Path, held: dict[str, Any]) -> None:
    new = path.with_suffix(".tmp")
    new.write_text(json.dumps(dict(sorted(held.items())), indent=1) + "\n")
    new.replace(path)


if __name__ == "__main__":
    sys.exit(main())
