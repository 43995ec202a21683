"""`pip install` gives a working package whatever the machine lacks: a compiler, or torch in the
build environment. Each case builds a wheel from a copy of the sources and runs it from a folder of
its own. The native build is what `make test` itself has made: tests/ops/test_native_build.py."""

from __future__ import annotations

import ensurepip
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
from types import SimpleNamespace

import pytest
import setuptools
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]

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
    for name in ("setup.py", "build_backend.py", "pyproject.toml", "MANIFEST.in", "README.md",
                 "LICENSE", "CHANGELOG.md", "constraints.txt"):  # fmt: skip
        shutil.copy(ROOT / name, copy)
    return copy


def bare_environment(to: Path) -> tuple[Path, Path]:
    """A new environment with nothing in it: its Python, and the folder of its packages."""
    venv.create(to / "bare", with_pip=False)
    python = to / "bare" / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return python, Path(run(python, "-c", where, cwd=to).strip())


def requirements(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().partition("\n\n")[0].splitlines()
    found = [line.removeprefix("Requires-Dist: ") for line in lines if "Requires-Dist" in line]
    assert len(found) == len(set(found))
    return {str(Requirement(line)).replace("'", '"') for line in found}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return copy_sources(tmp_path)


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pip_wheel(copy_sources(tmp_path_factory.mktemp("pure")), LS_BUILD="0")[0]


def test_a_build_without_kernels_is_pure_and_works(pure_wheel, tmp_path):
    assert_pure(pure_wheel, tmp_path)


def test_a_build_environment_without_torch_gives_the_pure_package(source, tmp_path):
    python, packages = bare_environment(tmp_path)
    installed = Path(setuptools.__file__).parent.parent
    for part in (*installed.glob("setuptools*"), installed / "_distutils_hack"):
        shutil.copytree(part, packages / part.name)
    wheel, said = pip_wheel(source, "--python", python)
    assert "torch cannot be imported while building" in said
    assert_pure(wheel, tmp_path)


def old_setuptools(version: str, folder: Path) -> Path:
    """Its wheel: the one that this Python's venv brings, or from where pip looks."""
    bundled = [Path(ensurepip.__file__).parent / "_bundled", Path("/usr/share/python-wheels")]
    for place in bundled:
        for path in place.glob(f"setuptools-{version}-*.whl"):
            return path
    command = ("-m", "pip", "download", "-q", "--no-deps", "-d", folder, f"setuptools=={version}")
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"setuptools {version} is not to be had here")
    return next(folder.glob("setuptools-*.whl"))


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="these have no distutils of Python")
@pytest.mark.parametrize("version", ["62.0.0", "65.5.0", "70.0.0"])
def test_a_venv_of_an_older_python_builds_without_wheel(source, pure_wheel, tmp_path, version):
    """65.5.0 is what a venv of Python 3.10 or 3.11 holds besides pip; 62 is the oldest."""
    python, packages = bare_environment(tmp_path)
    zipfile.ZipFile(old_setuptools(version, tmp_path)).extractall(packages)
    wheel, _ = pip_wheel(source, "--python", python, LS_BUILD="0")
    assert requirements(wheel) == requirements(pure_wheel)
    names = [set(zipfile.ZipFile(path).namelist()) for path in (wheel, pure_wheel)]
    assert {n for n in names[0] if ".dist-info" not in n} == {
        n for n in names[1] if ".dist-info" not in n
    }
    site = tmp_path / "installed"
    run(sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", site,
        wheel, cwd=tmp_path)  # fmt: skip
    assert list(site.glob("lottery_sparse-*.dist-info/LICENSE"))
    if version == "65.5.0":
        assert_pure(wheel, tmp_path)
        editable = ("install", "--no-index", "--no-build-isolation", "--no-deps", "-e", source)
        with pytest.raises(AssertionError, match=r"needs the package wheel .* run: python -m pip"):
            run(sys.executable, "-m", "pip", "--python", python, *editable, cwd=tmp_path)


@pytest.mark.parametrize(
    ("version", "sentence"),
    [
        (None, "built with setuptools, which is not installed here; run: python -m pip install"),
        ("59.6.0", "needs setuptools 62 or newer to be built, and 59.6.0 is installed here; run: "),
    ],
)
def test_a_missing_or_too_old_setuptools_is_said_in_a_sentence(source, tmp_path, version, sentence):
    python, packages = bare_environment(tmp_path)
    if version:  # as much of it as is asked before it is refused
        (packages / "setuptools").mkdir()
        text = (
            f"__version__ = {version!r}\nclass Command: pass\nclass Extension: pass\nsetup = None"
        )
        (packages / "setuptools" / "__init__.py").write_text(text)
        (packages / "setuptools" / "build_meta.py").touch()
    with pytest.raises(AssertionError, match=sentence) as error:
        pip_wheel(source, "--python", python)
    assert "Traceback" not in str(error.value)
    with pytest.raises(AssertionError, match=sentence) as error:
        run(python, "setup.py", "build_ext", cwd=source)
    assert "Traceback" not in str(error.value)


# ---- the index that torch comes from ------------------------------------------------------------


INDEX = "https://download.pytorch.org/whl/cpu"
STUB = """#!/bin/sh
test "$1" = -c && { echo "$ANSWER"; exit; }
echo "$@" >> calls
"""


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
@pytest.mark.parametrize("answer", ["", f"--index-url {INDEX}"])
def test_pytorchs_index_is_asked_for_torch_alone(tmp_path, answer):
    for name in ("Makefile", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    stub = tmp_path / ".venv" / "bin" / "python"
    stub.parent.mkdir(parents=True)
    stub.write_text(STUB)
    stub.chmod(0o755)
    run("make", ".venv/.requirements-installed", cwd=tmp_path, ANSWER=answer)
    calls = (tmp_path / "calls").read_text().splitlines()
    asked = [call for call in calls if "index-url" in call]
    if not answer:
        assert not asked
    else:
        assert asked == calls[:1]
        assert calls[0].endswith(f"install -c constraints.txt --no-deps --index-url {INDEX} torch")
    assert " torch numpy " in calls[len(asked)]


@pytest.mark.parametrize(("status", "said"), [(200, f"--index-url {INDEX}\n"), (404, "")])
def test_the_cpu_build_is_asked_for_where_its_index_answers(monkeypatch, capsys, status, said):
    program = (ROOT / "Makefile").read_text().partition("define TORCH_INDEX\n")[2]
    program = program.partition("endef")[0]
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("shutil.which", lambda name: None)
    for answer in (lambda *a, **o: SimpleNamespace(status=status), unreachable):
        monkeypatch.setattr("urllib.request.urlopen", answer)
        exec(program, {})
    assert capsys.readouterr().out == said


def unreachable(*args: object, **options: object) -> None:
    raise OSError("no route to host")


def test_no_command_of_ours_asks_a_second_index():
    files = [ROOT / "Makefile", *ROOT.glob("*.md"), *ROOT.glob("*.toml"), *(ROOT / ".ci").iterdir()]
    files += [p for p in (ROOT / ".github").rglob("*") if p.is_file()]
    assert [path.name for path in files if "extra-index-url" in path.read_text()] == []


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
    kernels = {str(path.relative_to(source)) for path in (source / "csrc").rglob("*.*")}
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
