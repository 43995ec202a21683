"""What the CUDA kernels take of a multiprocessor: registers, spills, shared memory, instructions.

`python -m benchmarks.compile.cuda_resources` compiles csrc/*/*_cuda.cu with nvcc, without a GPU,
and writes results/cuda_resources.json; test_cuda_resources.py holds the kernels to that table. How
many instructions a loop has comes from cuobjdump, which Triton brings along; without it, that is
null.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "cuda_resources.json"
ARCHITECTURES = ("80", "90a")
FLAGS = ("-std=c++20", "-O3")


def kernel_files() -> list[Path]:
    return sorted((ROOT / "csrc").rglob("*_cuda.cu"), key=lambda path: path.name)


def source_hash() -> str:
    """Of the kernels, and of the headers of theirs that they include."""
    seen: dict[Path, None] = {}
    waiting = kernel_files()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen[path] = None
        for name in re.findall(r'#include "([^"]+)"', path.read_text("utf-8")):
            if (header := ROOT / "csrc" / name).is_file():  # not the emulator's, which nvcc skips
                waiting.append(header)
    digest = hashlib.sha256(repr(FLAGS).encode())
    for path in sorted(seen):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def nvcc_version() -> str | None:
    """Such as "13.0.88"; None without nvcc."""
    if shutil.which("nvcc") is None:
        return None
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    found = re.search(r"V([\d.]+)", said)
    return found[1] if found else None


def measure(architecture: str, files: Sequence[Path] | None = None) -> dict[str, dict[str, Any]]:
    """Kernel -> what it takes; of some files, or of all."""
    found: dict[str, dict[str, Any]] = {}
    for path in kernel_files() if files is None else files:
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
            command = [
                "nvcc",
                *FLAGS,
                f"-I{ROOT}/csrc",
                target,
                "-Xptxas",
                "-v",
                "-cubin",
                "-o",
                cubin,
                path,
            ]
            done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"nvcc cannot compile {path.name}:\n{done.stderr}")
            loops = _loops(cubin)
        for block in done.stderr.split("Compiling entry function")[1:]:
            name = re.search(r"'(\S+)'", block)
            used = re.search(r"Used (\d+) registers", block)
            spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", block)
            if not (name and used and spills):
                raise RuntimeError(f"nvcc said something new about {path.name}:\n{block}")
            shared = re.search(r"(\d+) bytes smem", block)
            row: dict[str, Any] = {
                "registers": int(used[1]),
                "stack": int(spills[1]),
                "spills": int(spills[2]),
                "static_shared": int(shared[1]) if shared else 0,
            }
            key = f"{path.stem.removesuffix('_cuda')} {_readable(name[1])}"
            found[key] = row | {"loop": loops.get(name[1])}
    return found


def _readable(mangled: str) -> str:
    """ "ternary_kernel BFloat16 1": the template's arguments after the name."""
    name = re.search(r"\d+([a-z_]+_kernel)", mangled)
    if name is None:
        return mangled
    found = re.findall(
        r"\d(BFloat16|Float\d+)|Li(\d+)E|L(?:b|NS0_4BitsE)(\d)E|I([tj])E", mangled[name.end() :]
    )
    arguments = (a or b or c or {"t": "16", "j": "32"}[d] for a, b, c, d in found)
    return " ".join([name[1].lstrip("_"), *arguments])


def _loops(cubin: Path) -> dict[str, dict[str, int]]:
    """Function -> instructions of the innermost loop with its most products, of matrices or not."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return {}
    tool = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    said = subprocess.run([str(tool), "-sass", str(cubin)], capture_output=True, text=True).stdout
    found = {}

    def rank(body: list[str]) -> tuple[int, int]:
        return -body.count("HMMA"), len(body)

    for function in re.split(r"\n\s*Function : ", said)[1:]:
        lines = [
            (int(at, 16), name, rest)
            for at, name, rest in re.findall(
                r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?\s*([A-Z0-9]+)([^;]*);", function
            )
        ]
        best: list[str] | None = None
        product = "HMMA" if any(name == "HMMA" for _, name, _ in lines) else "FFMA"
        for at, name, rest in lines:
            to = re.search(r"0x([0-9a-f]+)", rest) if name == "BRA" else None
            if to is None or int(to[1], 16) >= at:
                continue
            body = [other for where, other, _ in lines if int(to[1], 16) <= where <= at]
            if product in body and (best is None or rank(body) < rank(best)):
                best = body
        if best is not None:
            counts = {name: best.count(name) for name in sorted(set(best))}
            found[function.split("\n")[0].strip()] = {"all": len(best)} | counts
    return found


def _on_one_line(found: re.Match[str]) -> str:
    return "{" + " ".join(found[1].split()) + "}"


def main() -> None:
    table = {
        "source": source_hash(),
        "nvcc": nvcc_version(),
        "kernels": {name: measure(name) for name in ARCHITECTURES},
    }
    text = json.dumps(table, indent=1)  # a kernel's row on one line
    text = re.sub(r"\{([^{}]*)\}", lambda row: "{" + " ".join(row[1].split()) + "}", text)
    text = re.sub(r'\{\s+("registers"[^{}]*(?:\{[^{}]*\})?)\s*\}', _on_one_line, text)
    RESULTS.write_text(text + "\n", "utf-8")
    for architecture, kernels in table["kernels"].items():
        for name, row in kernels.items():
            loop = (row["loop"] or {}).get("all")
            print(f"sm_{architecture:4} {name:50} {row['registers']:4} registers, "
                  f"{row['spills']} bytes spilled, loop of {loop}")  # fmt: skip


if __name__ == "__main__":
    main()
