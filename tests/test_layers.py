"""Imports point down only, kernels know no torch, and no file is ever executed."""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lottery_sparse"

# module -> modules of the package it may import. The compiled modules are _C, _C_cuda and _host.
MAY_IMPORT: dict[str, set[str]] = {
    # ways to compute
    "formats": set(),
    "reference": {"formats"},
    "dense": {"kernels", "reference"},
    "native": {"_C", "reference"},
    "native_cuda_compact": {"reference"},
    "native_cuda_masks": set(),
    "native_cuda_optim": {"step_tables"},
    "native_cuda": {
        "_C_cuda",
        "formats",
        "native_cuda_compact",
        "native_cuda_masks",
        "native_cuda_optim",
    },
    "step_tables": set(),
    "kernels": {"reference", "step_tables"},
    # whole files, and what they say
    "text": set(),
    "files": {"text"},
    # which one runs
    "backends": set(),
    "random": {"backends", "text"},
    # kept weights as lists
    "compact": set(),
    # contract of the ops
    "ops": {"backends", "compact", "formats", "random", "reference"},
    # the ideas of the paper
    "names": set(),
    "masks": {"mask_tensor", "names", "text"},
    "loading": {"masks", "names"},
    "criteria": {"random"},
    "actions": {"random"},
    "prune": {"criteria", "masks", "names", "ops", "random", "text"},
    # stateful things
    "frozen": {"ops", "random", "text"},
    "mask_tensor": set(),
    "rest": {"backends", "dense", "mask_tensor"},
    "modules": {"frozen", "loading", "mask_tensor", "masks", "ops", "reference", "rest"},
    "supermask": {"frozen", "masks", "modules", "ops", "random", "recompute", "reference", "text"},
    "convert": {
        "compact",
        "frozen",
        "mask_tensor",
        "masks",
        "modules",
        "names",
        "supermask",
        "text",
        "weight_types",
    },
    "recompute": set(),
    "densify": {
        "compact_base",
        "compact_layers",
        "compacting",
        "convert",
        "modules",
        "names",
        "packed",
        "packing",
    },
    "weight_types": set(),
    "supermasking": {
        "convert",
        "frozen",
        "masks",
        "modules",
        "names",
        "random",
        "supermask",
        "ticket",
    },
    "compact_parts": {"backends", "compact", "mask_tensor", "modules", "reference"},
    "compact_slots": {"compact", "compact_parts", "mask_tensor"},
    "compact_init": {"reference"},
    "compact_effective": {
        "backends",
        "compact",
        "compact_parts",
        "compact_slots",
        "mask_tensor",
        "modules",
        "reference",
    },
    "compact_base": {
        "compact",
        "compact_effective",
        "compact_init",
        "compact_parts",
        "compact_slots",
        "frozen",
        "loading",
        "modules",
        "reference",
    },
    "compact_layers": {"compact_base", "mask_tensor", "modules", "ops", "reference"},
    "compacting": {
        "compact",
        "compact_base",
        "compact_layers",
        "compact_parts",
        "convert",
        "modules",
        "reference",
    },
    "packing": {"formats", "ops", "reference"},
    "packed": {"compact", "formats", "modules", "ops", "packing", "reference"},
    "pack": {"compacting", "convert", "densify", "modules", "packed"},
    "measuring": {"compact_base", "compacting", "densify", "modules", "ops", "pack", "packed"},
    "example": {"modules"},
    "plan_table": {"measuring"},
    "plan": {
        "backends",
        "compact_base",
        "compact_parts",
        "compacting",
        "convert",
        "densify",
        "example",
        "files",
        "measuring",
        "modules",
        "pack",
        "plan_table",
    },
    "optim_plan": {"backends", "compact", "ops"},
    "optim_groups": {"modules"},
    "optim": {"backends", "compact", "optim_groups", "optim_plan", "rest"},
    "replicate": {
        "compact_base",
        "compact_layers",
        "compact_parts",
        "compacting",
        "convert",
        "frozen",
        "mask_tensor",
        "modules",
        "reference",
        "supermask",
    },
    "channel_reads": {"compact_layers", "modules", "replicate"},
    "channels": {"channel_reads", "compact_base", "compacting", "modules", "replicate"},
    "step": {
        "backends",
        "compact",
        "compact_layers",
        "mask_tensor",
        "optim",
        "replicate",
        "supermask",
    },
    "ticket_file": {"files", "frozen", "masks", "names", "text"},
    "ticket": {"compact", "convert", "densify", "frozen", "masks", "names", "text", "ticket_file"},
    "ticket_search": {
        "actions",
        "convert",
        "criteria",
        "densify",
        "frozen",
        "masks",
        "modules",
        "names",
        "prune",
        "random",
        "text",
        "ticket",
        "ticket_file",
    },
    # what people call
    "doctor_cases": {"compact", "formats", "reference"},
    "doctor_steps": {"backends", "compacting", "convert", "densify", "optim", "reference", "step"},
    "doctor": {"backends", "doctor_cases", "doctor_steps", "doctor_torch", "ops", "reference"},
    "__main__": {"convert", "doctor", "modules", "plan", "text", "ticket"},
    "doctor_torch": set(),
}
TOP = {"__init__"}  # imports the public names, and nobody imports it but to ask for the version


def files_of(module: str) -> list[Path]:
    folder = PACKAGE / module
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{module}.py"]


def modules() -> set[str]:
    files = {path.stem for path in PACKAGE.glob("*.py")}
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    return (files | folders) - TOP


def imported_modules(path: Path) -> Iterator[str]:
    """The modules of the package that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: write imports in full, not relative"
            if node.module == "lottery_sparse":
                yield from (alias.name for alias in node.names)
            elif node.module and node.module.startswith("lottery_sparse."):
                yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("lottery_sparse."):
                    yield alias.name.split(".")[1]


def test_the_table_names_every_module():
    assert modules() == set(MAY_IMPORT)


def test_the_table_has_no_cycle():
    tuple(graphlib.TopologicalSorter(MAY_IMPORT).static_order())


@pytest.mark.parametrize("module", MAY_IMPORT)
def test_imports_point_down(module):
    for path in files_of(module):
        upwards = set(imported_modules(path)) - MAY_IMPORT[module] - {module}
        assert not upwards, f"{path.relative_to(ROOT)} may not import {sorted(upwards)}"


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", sources("lottery_sparse"), ids=lambda p: p.name)
def test_the_package_knows_nothing_above_it(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            assert name.split(".")[0] not in {"experiments", "benchmarks", "tests"}


def called(node: ast.Call) -> str:
    """torch.load(...) -> "torch.load"; what is not a dotted name -> ""."""
    try:
        name = ast.unparse(node.func)
    except ValueError:
        return ""
    return name if re.fullmatch(r"[\w.]+", name) else ""


UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


@pytest.mark.parametrize(
    "path", sources("lottery_sparse", "experiments", "benchmarks"), ids=lambda p: p.name
)
def test_no_file_is_executed(path):
    """Design D11: nothing is unpickled; torch.load only with weights_only=True; no eval."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name.split(".")[0] for alias in node.names}
            names |= {(getattr(node, "module", None) or "").split(".")[0]}
            assert not names & UNSAFE_MODULES, f"line {node.lineno}"
        elif isinstance(node, ast.Call):
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert called(node) not in {"eval", "exec"}, f"line {node.lineno}"
            if called(node) == "torch.load":
                assert keywords.get("weights_only") == "True", f"line {node.lineno}"
            if called(node) in {"np.load", "numpy.load"}:
                assert "allow_pickle" not in keywords, f"line {node.lineno}"


RANDOM_OPS = "rand randn randint randperm rand_like randn_like bernoulli normal multinomial"
DRAWS = {f"torch.{name}" for name in RANDOM_OPS.split()}


@pytest.mark.parametrize("path", sources("lottery_sparse"), ids=lambda p: p.name)
def test_nothing_draws_from_global_state(path):
    """Design D8: everything random takes a seed or a generator."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call):
            name = called(node)
            assert name not in {"torch.manual_seed", "random.seed"}, f"line {node.lineno}"
            if name in DRAWS:
                given = {k.arg for k in node.keywords}
                assert "generator" in given, f"line {node.lineno}: {name} without generator="


CSRC = sorted(p for p in (ROOT / "csrc").glob("*") if p.suffix in {".cpp", ".h", ".cu", ".cuh"})
INCLUDE = re.compile(r'#\s*include\s*[<"](torch|ATen|c10|pybind11|Python\.h)')
# the rim: _C is bindings*.cpp with rim.h on torch's stable ABI, _host is host.cpp on pybind11
MAY_INCLUDE = {
    "rim.h": {"torch"},
    "parallel_rim.h": {"torch"},
    "bindings.cpp": {"Python.h"},
    "cuda_rim.h": {"torch"},
    "bindings_cuda.cpp": {"Python.h"},
    "host.cpp": {"pybind11"},
    "eager_optim.cpp": {"torch", "ATen"},
    "eager.cpp": {"torch", "ATen", "c10"},  # built for one torch version, see DECISIONS.md
    "eager_linear.h": {"ATen"},
}


@pytest.mark.parametrize("path", CSRC, ids=lambda p: p.name)
def test_kernels_know_pointers_not_torch(path):
    """Only the rim includes a framework's headers, and only the one that it binds to (D6)."""
    text = path.read_text("utf-8")
    found = set(INCLUDE.findall(text))
    assert found <= MAY_INCLUDE.get(path.name, set())
    beyond_stable = re.findall(r"<torch/(?!csrc/stable/|csrc/inductor/aoti_torch/c/)[^>]*>", text)
    assert not beyond_stable or path.name.startswith("eager"), "not part of the stable ABI"


OURS = {"lottery_sparse", "experiments", "benchmarks"}
MAY_IMPORT_PRIVATE = {"_C", "_C_cuda", "_host"}  # the compiled modules


@pytest.mark.parametrize("path", sources(*sorted(OURS)), ids=lambda p: p.name)
def test_names_of_other_modules_are_public(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OURS:
            private = {a.name for a in node.names if a.name.startswith("_")} - MAY_IMPORT_PRIVATE
            assert not private, f"line {node.lineno}: {sorted(private)} of {node.module}"
