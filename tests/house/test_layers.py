"""Imports point down only, kernels know no torch, and no file is ever executed."""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# The folders and single files of the package, from the top floor to the ground. A file imports from
# its own folder and from floors below it; folders on one floor know nothing of each other.
FLOORS = """
__main__
tools
__init__
ensemble learning old_names
planning tickets channels optim
nn/forms
nn/compact
nn
pruning
ops
ops/supermask ops/packed ops/steps ops/selection
ops/compact
ops/masked
ops/common
ops/bits
ops/triton
ops/random
ops/dispatch ops/limits
measurements
files
text
"""
STUDY_FLOORS = """
__main__
tools
show
show/figures
findings
sweep
store
train
study
files timing __init__
"""
HOUSES = {"lottery_sparse": FLOORS, "experiments": STUDY_FLOORS}


def floors_of(house: str) -> dict[str, int]:
    rows = HOUSES[house].split("\n")
    return {place: i for i, row in enumerate(rows) for place in row.split()}


COMPILED = {"_C", "_C_cuda", "_host"}
MOST_PYTHON, MOST_CSRC = 16, 30  # files in a folder


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text("utf-8")))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def exists(module: str) -> bool:
    path = ROOT.joinpath(*module.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def imported(path: Path) -> Iterator[str]:
    """The modules of ours that a file imports, also inside functions."""
    for node in nodes(path):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full, not relative"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if exists(inner) else node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def place_of(module: str, floors: dict[str, int]) -> str:
    """The folder of a module, as the floors write it, or the module if it is there."""
    path = "/".join(module.split(".")[1:])
    return path if path in floors else path.rpartition("/")[0] if path else "__init__"


@pytest.mark.parametrize("house", HOUSES)
def test_the_floors_name_every_folder(house):
    floors = floors_of(house)
    assert {place_of(module_of(path), floors) for path in sources(house)} == set(floors)


@pytest.mark.parametrize("house", HOUSES)
def test_imports_point_down(house):
    floors, upward = floors_of(house), []
    for path in sources(house):
        here = place_of(module_of(path), floors)
        for module in imported(path):
            if module == house or not module.startswith(f"{house}."):
                continue  # the package itself is asked for its version
            if module.split(".")[1] in COMPILED:
                continue
            if path.name == "__init__.py" and module.startswith(f"{module_of(path)}."):
                continue  # the public names of a folder, its inner folders' among them
            there = place_of(module, floors)
            if there != here and floors[there] <= floors[here]:
                upward.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not upward


@pytest.mark.parametrize("house", HOUSES)
def test_no_files_import_each_other_in_a_circle(house):
    graph = {
        module_of(path): {m for m in imported(path) if exists(m) and m != house}
        for path in sources(house)
    }
    tuple(graphlib.TopologicalSorter(graph).static_order())


def test_folders_hold_few_files():
    folders = {path.parent for path in sources(*HOUSES)}
    crowded = {str(f): n for f in folders if (n := len(list(f.glob("*.py")))) > MOST_PYTHON}
    for folder in {path.parent for path in CSRC}:
        if (count := len([p for p in CSRC if p.parent == folder])) > MOST_CSRC:
            crowded[str(folder)] = count
    assert not crowded


def test_the_package_knows_nothing_above_it():
    for path in sources("lottery_sparse"):
        above = {m.split(".")[0] for m in imported(path)} & {"experiments", "benchmarks", "tests"}
        assert not above, path


def called(node: ast.Call) -> str:
    """torch.load(...) -> "torch.load"; what is not a dotted name -> ""."""
    try:
        name = ast.unparse(node.func)
    except ValueError:
        return ""
    return name if re.fullmatch(r"[\w.]+", name) else ""


UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


# reads arrays by an Unpickler whose find_class calls nothing that a file names
RESTRICTED = {ROOT / "experiments" / "train" / "pickled.py": {"pickle"}}


def test_no_file_is_executed():
    """Design D11: nothing is unpickled; torch.load only with weights_only=True; no eval."""
    for path in sources("lottery_sparse", "experiments", "benchmarks"):
        unsafe = {m.split(".")[0] for m in imported(path)} & UNSAFE_MODULES
        assert unsafe == RESTRICTED.get(path, set()), path
        for node in nodes(path):
            if isinstance(node, ast.Call):
                where = f"{path}:{node.lineno}"
                keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert called(node) not in {"eval", "exec", "pickle.load", "pickle.loads"}, where
                if called(node) == "torch.load":
                    assert keywords.get("weights_only") == "True", where
                if called(node) in {"np.load", "numpy.load"}:
                    assert "allow_pickle" not in keywords, where


RANDOM_OPS = "rand randn randint randperm rand_like randn_like bernoulli normal multinomial"
DRAWS = {f"torch.{name}" for name in RANDOM_OPS.split()}


def test_nothing_draws_from_global_state():
    """Design D8: everything random takes a seed or a generator."""
    for path in sources("lottery_sparse"):
        for node in nodes(path):
            if isinstance(node, ast.Call):
                name, where = called(node), f"{path}:{node.lineno}"
                assert name not in {"torch.manual_seed", "random.seed"}, where
                if name in DRAWS:
                    given = {k.arg for k in node.keywords}
                    assert "generator" in given, f"{where}: {name} without generator="


CSRC = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".cpp", ".h", ".cu", ".cuh"})
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
    # built for one torch version, see DECISIONS.md
    "eager.cpp": {"torch", "ATen", "c10"},
    "eager_compact.h": {"ATen"},
    "eager_masked.h": {"torch", "ATen"},
    "eager_node.h": {"torch"},
    "eager_tensors.h": {"ATen"},
}


def test_kernels_know_pointers_not_torch():
    """Only the rim includes a framework's headers, and only the one that it binds to (D6)."""
    assert CSRC
    for path in CSRC:
        text = path.read_text("utf-8")
        found = set(INCLUDE.findall(text))
        assert found <= MAY_INCLUDE.get(path.name, set()), path
        beyond = re.findall(r"<torch/(?!csrc/stable/|csrc/inductor/aoti_torch/c/)[^>]*>", text)
        assert not beyond or path.name.startswith("eager"), f"{path}: no part of the stable ABI"


def test_names_of_other_modules_are_public():
    for path in sources("lottery_sparse", "experiments", "benchmarks"):
        for node in nodes(path):
            if isinstance(node, ast.ImportFrom) and exists((node.module or "").split(".")[0]):
                names = {a.name for a in node.names if a.name.startswith("_")} - COMPILED
                assert not names, f"{path}:{node.lineno}: {sorted(names)} of {node.module}"
