"""docs/write-a-kernel.md: its blocks make an op in a copy of the package, built and tested."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_layers import ROOT
from torch.utils.cpp_extension import include_paths

PAGE = (ROOT / "docs" / "write-a-kernel.md").read_text("utf-8")
# `path`, and the block below it
FILES = dict(re.findall(r"^`([\w./]+)`\n\n```(?:python|cpp)\n(.*?)^```", PAGE, re.M | re.S))
# a line of the page -> the file that it goes into, and the line before it
LINES = {
    '    "kept_energy": ("energy", ""),\n': (
        "lottery_sparse/ops/dispatch.py",
        "PLACES: dict[str, tuple[str, str]] = {\n",
    ),
    '        "kept_energy": ("cpu", "reference"),\n': (
        "lottery_sparse/ops/dispatch.py",
        'PREFERENCE: dict[str, dict[str, tuple[str, ...]]] = {\n    "cpu": {\n',
    ),
    '    "kept_energy(Tensor weight, Tensor mask) -> Tensor",\n': (
        "csrc/rim/schemas.h",
        "constexpr const char* kSchemas[] = {\n",
    ),
}

# In the package the schema is one of kSchemas, which rim/bindings.cpp defines.
DEFINES = """#include <torch/csrc/stable/library.h>
STABLE_TORCH_LIBRARY_FRAGMENT(lottery_sparse_native, m) { m.def(SCHEMA); }
"""
CPP = [path for path in FILES if path.endswith(".cpp")]


def written(folder: Path) -> None:
    """The copy of the package, with what the page adds."""
    skip = shutil.ignore_patterns("__pycache__", "*.cu")
    for part in ("lottery_sparse", "csrc"):
        shutil.copytree(ROOT / part, folder / part, ignore=skip)
    for path, text in FILES.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, "utf-8")
    for line, (path, before) in LINES.items():
        assert line in PAGE
        text = (folder / path).read_text("utf-8")
        assert text.count(before) == 1, f"{path} has no {before!r}"
        (folder / path).write_text(text.replace(before, before + line), "utf-8")


def compiled(folder: Path, compiler: str) -> Path:
    """The three files of the kernel, its schema and the choice of variants, as one library."""
    schema = next(line.strip().rstrip(",") for line in LINES if " -> " in line)
    (folder / "schema.cpp").write_text(DEFINES.replace("SCHEMA", schema), "utf-8")
    library = folder / "kept_energy.so"
    lib = Path(torch.__file__).parent / "lib"
    command = [
        compiler, "-std=c++20", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-Icsrc",
        "-DLS_VARIANT=portable", "-DLS_X86_VARIANTS=0", "-DTORCH_TARGET_VERSION=0x020b000000000000",
        *(f"-I{path}" for path in include_paths()),
        *CPP, "csrc/common/variants.cpp", "schema.cpp", "-o", library.name,
        f"-L{lib}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{lib}",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library


def passed(folder: Path, prelude: str = "") -> str:
    """The page's test in the copy, in a process of its own; what pytest said."""
    program = (
        f"import sys, torch, pytest\n{prelude}\nimport lottery_sparse\n"
        "assert lottery_sparse.__file__.startswith(sys.path[0]), lottery_sparse.__file__\n"
        "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', 'tests/ops/energy']))\n"
    )
    (folder / "run.py").write_text(program, "utf-8")
    path = os.pathsep.join([str(folder), str(ROOT / "tests" / "problems")])
    done = subprocess.run(
        [sys.executable, "run.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_page_has_all_files():
    names = sorted(path for path in FILES if path.startswith("csrc/"))
    assert names == [
        "csrc/energy/bindings_kept_energy.cpp",
        "csrc/energy/kept_energy.h",
        "csrc/energy/kept_energy_cpu.cpp",
    ]


@pytest.mark.slow
def test_the_op_runs_on_its_definition_alone(tmp_path):
    written(tmp_path)
    (tmp_path / "lottery_sparse/ops/energy/cpu.py").unlink()
    assert "14 passed" in passed(tmp_path)


@pytest.mark.slow
def test_the_kernel_compiles_and_agrees_with_the_definition(tmp_path):
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if compiler is None or not list((ROOT / "lottery_sparse").glob("_C.*so")):
        pytest.skip("no C++ compiler, or the package is built without kernels")
    written(tmp_path)
    library = compiled(tmp_path, compiler)
    said = passed(tmp_path, f"torch.ops.load_library({str(library)!r})")
    assert "26 passed" in said
