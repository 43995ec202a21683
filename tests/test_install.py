"""`pip install` gives a working package whatever the machine lacks: a compiler, or torch in the
build environment. Each case builds a wheel from a copy of the sources and runs it from a folder of
its own. The native build is what `make test` itself has made: tests/test_native_build.py."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.slow


def run(*command: object, cwd: Path, **environment: str) -> str:
    """stdout and stderr of a command that must succeed, away from this checkout."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"} | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def pip_wheel(source: Path, *options: object, **environment: str) -> tuple[Path, str]:
    """Builds a wheel without build isolation and without network; its path, and what pip said."""
    out = source.parent / "wheels"
    pip = (sys.executable, "-m", "pip", *options)
    said = run(
        *pip, "wheel", "-v", "--no-index", "--no-build-isolation", "--no-deps", "-w", out, source,
        cwd=source.parent, **environment,
    )  # fmt: skip
    (wheel,) = out.glob("*.whl")
    return wheel, said


def doctor(wheel: Path, cwd: Path) -> dict:
    """What the doctor of an unpacked wheel reports, with this environment's torch."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(cwd / "site")
    # -S: this environment's editable install must not lend the wheel its kernels
    paths = os.pathsep.join([str(cwd / "site"), sysconfig.get_path("purelib")])
    said = run(sys.executable, "-S", "-m", "lottery_sparse", "doctor", "--json",
               cwd=cwd, PYTHONPATH=paths)  # fmt: skip
    return json.loads(said)


def assert_pure(wheel: Path, cwd: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [n for n in zipfile.ZipFile(wheel).namelist() if n.endswith((".so", ".pyd"))]
    found = doctor(wheel, cwd)
    assert found["healthy"]
    assert found["native"]["_C"]["state"] == "missing"
    assert "cpu" not in {op["backend"] for op in found["ops"]["cpu"].values()}


def copy_sources(to: Path) -> Path:
    """What a source distribution holds, without anything built."""
    copy = to / "source"
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.o")
    for name in ("lottery_sparse", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE",
                 "CHANGELOG.md", "constraints.txt"):  # fmt: skip
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return copy_sources(tmp_path)


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pip_wheel(copy_sources(tmp_path_factory.mktemp("pure")), LS_BUILD="0")[0]


def test_a_build_without_kernels_is_pure_and_works(pure_wheel, tmp_path):
    assert_pure(pure_wheel, tmp_path)


def test_a_build_environment_without_torch_gives_the_pure_package(source, tmp_path):
    bare = tmp_path / "bare"
    venv.create(bare, with_pip=False)
    python = bare / "bin" / "python"
    purelib = run(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path
    )
    installed = Path(setuptools.__file__).parent.parent
    for part in (*installed.glob("setuptools*"), installed / "_distutils_hack"):
        shutil.copytree(part, Path(purelib.strip()) / part.name)
    wheel, said = pip_wheel(source, "--python", python)
    assert "torch cannot be imported while building" in said
    assert_pure(wheel, tmp_path)


def test_no_compiler_gives_the_pure_package_and_one_line_that_says_so(source, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    wheel, said = pip_wheel(source, PATH=str(empty), CXX="", CC="")
    assert_pure(wheel, tmp_path)
    # setup.py runs once per build step, each time with the same line
    assert len({line.strip() for line in said.splitlines() if "no C++ compiler" in line}) == 1, said


def test_a_required_build_that_cannot_be_done_fails(source, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(AssertionError, match="compiler"):
        pip_wheel(source, PATH=str(empty), CXX="", CC="", LS_BUILD="require")


def test_the_wheel_asks_for_torch_but_never_caps_it(pure_wheel):
    with zipfile.ZipFile(pure_wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = archive.read(name).decode()
        names = archive.namelist()
    required = [
        line.removeprefix("Requires-Dist: ")
        for line in metadata.splitlines()
        if line.startswith("Requires-Dist") and "extra ==" not in line
    ]
    assert sorted(required) == ["numpy", "safetensors", "torch>=2.11"]
    assert "lottery_sparse/py.typed" in names
    assert {n.split("/")[0].split("-")[0] for n in names} == {"lottery_sparse"}


def test_the_source_distribution_holds_the_kernels_and_nothing_built(source, tmp_path):
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    run(sys.executable, "-c", build, cwd=source, LS_BUILD="0")
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    kernels = {f"csrc/{path.name}" for path in (source / "csrc").iterdir()}
    assert kernels
    assert kernels | {"setup.py", "pyproject.toml", "constraints.txt", "LICENSE"} <= names
    assert not [name for name in names if name.endswith((".so", ".o"))]


def test_build_from_an_installed_wheel_says_where_to_build(pure_wheel, tmp_path):
    with zipfile.ZipFile(pure_wheel) as archive:
        archive.extractall(tmp_path)
    with pytest.raises(AssertionError, match=r"no kernel sources .* --no-build-isolation"):
        run(sys.executable, "-m", "lottery_sparse", "build", cwd=tmp_path)


def test_doctor_reports_a_kernel_file_that_does_not_load(pure_wheel, tmp_path):
    with zipfile.ZipFile(pure_wheel) as archive:
        archive.extractall(tmp_path)
    (tmp_path / "lottery_sparse" / "_C.abi3.so").write_bytes(b"not a shared object")
    command = (sys.executable, "-m", "lottery_sparse", "doctor", "--json")
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert not found["healthy"]
    assert found["native"]["_C"]["state"] == "broken"
    assert "_C.abi3.so" in found["native"]["_C"]["error"]


def test_import_time_over_torch(record_property):
    """Reported, not asserted: this machine may be busy."""
    code = (
        "import time, torch, numpy; start = time.perf_counter(); import lottery_sparse; "
        "print(time.perf_counter() - start)"
    )
    seconds = min(float(run(sys.executable, "-c", code, cwd=ROOT)) for _ in range(2))
    record_property("import_over_torch_seconds", round(seconds, 3))
    print(f"import lottery_sparse over torch: {seconds:.3f} s")
