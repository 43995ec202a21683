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
    "dense": {"reference", "kernels"},
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
    # whole files
    "files": set(),
    # which one runs
    "backends": set(),
    "random": {"backends"},
    # kept weights as lists
    "compact": set(),
    # contract of the ops
    "ops": {"backends", "random", "reference", "compact", "formats"},
    # the ideas of the paper
    "masks": set(),
    "criteria": {"random"},
    "actions": {"random"},
    "prune": {"ops", "random", "masks", "criteria"},
    # stateful things
    "frozen": {"ops", "random"},
    "mask_tensor": set(),
    "rest": {"backends", "dense", "mask_tensor"},
    "modules": {"ops", "reference", "mask_tensor", "masks", "frozen", "rest"},
    "supermask": {"ops", "random", "reference", "masks", "frozen", "modules"},
    "convert": {"compact", "mask_tensor", "masks", "frozen", "modules", "supermask"},
    "densify": {"modules", "convert"},
    "supermasking": {
        "random",
        "masks",
        "frozen",
        "modules",
        "supermask",
        "convert",
        "ticket",
    },
    "compact_parts": {"backends", "reference", "compact", "mask_tensor", "modules"},
    "compact_init": {"reference"},
    "compact_effective": {
        "backends",
        "reference",
        "compact",
        "compact_parts",
        "mask_tensor",
        "modules",
    },
    "compact_base": {
        "reference",
        "compact",
        "compact_parts",
        "compact_effective",
        "compact_init",
        "frozen",
        "modules",
    },
    "compact_layers": {"reference", "compact_base", "mask_tensor", "modules", "ops"},
    "compacting": {
        "reference",
        "compact",
        "compact_parts",
        "compact_base",
        "compact_layers",
        "convert",
        "modules",
    },
    "plan": {
        "backends",
        "files",
        "ops",
        "modules",
        "compact_base",
        "convert",
        "densify",
        "compacting",
        "packed",
    },
    "optim_plan": {"backends", "compact", "ops"},
    "optim": {"backends", "compact", "optim_plan", "rest"},
    "replicate": {
        "reference",
        "frozen",
        "mask_tensor",
        "modules",
        "compact_parts",
        "compact_base",
        "compact_layers",
        "convert",
        "compacting",
        "supermask",
    },
    "channel_reads": {"modules", "compact_layers", "replicate"},
    "channels": {
        "modules",
        "compact_base",
        "compacting",
        "replicate",
        "channel_reads",
    },
    "step": {
        "backends",
        "compact",
        "compact_layers",
        "mask_tensor",
        "optim",
        "replicate",
        "supermask",
    },
    "packing": {"formats", "ops", "reference"},
    "packed": {"compacting", "convert", "densify", "modules", "ops", "packing"},
    "ticket_file": {"files", "masks", "frozen"},
    "ticket": {"masks", "frozen", "convert", "densify", "ticket_file"},
    "ticket_search": {
        "random",
        "masks",
        "criteria",
        "actions",
        "prune",
        "frozen",
        "modules",
        "convert",
        "densify",
        "ticket",
        "ticket_file",
    },
    # what people call
    "doctor_cases": {"compact", "formats", "reference"},
    "doctor_steps": {"backends", "reference", "convert", "densify", "compacting", "optim", "step"},
    "doctor": {"backends", "doctor_cases", "doctor_steps", "ops", "reference", "_C", "_host"},
    "__main__": {"doctor", "convert", "modules", "plan", "ticket"},
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
