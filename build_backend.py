"""The build backend: setuptools' own, also where a fresh environment has little of it.

`pip install --no-build-isolation .` builds with the tools that are installed. The environments that
Python's venv makes have setuptools 65 and no `wheel` (Python 3.10 and 3.11), and such a setuptools
needs `wheel` to write one; BdistWheel does it instead. Those of Python 3.12 and later have neither.
"""

import base64
import hashlib
import importlib.util
import os
import shutil
import sys
import sysconfig
import tempfile
import zipfile

NEWER = "run: python -m pip install -U setuptools wheel"
OLDEST = (62, 0)  # reads pyproject.toml, and leaves the license to setup.py
OWN_WHEELS = (70, 1)  # has the command bdist_wheel itself

try:
    import setuptools
    from setuptools import Command
    from setuptools.build_meta import *  # noqa: F403
except ImportError:
    sys.exit(f"lottery_sparse is built with setuptools, which is not installed here; {NEWER}")

VERSION = tuple(int(number) for number in setuptools.__version__.split(".")[:2])
NO_WHEEL = VERSION < OWN_WHEELS and importlib.util.find_spec("wheel") is None
if VERSION < OLDEST:
    sys.exit(
        f"lottery_sparse needs setuptools 62 or newer to be built, and {setuptools.__version__} is "
        f"installed here; {NEWER}"
    )


class BdistWheel(Command):
    """Writes a wheel as the package `wheel` would: what `build` made, and its metadata."""

    user_options = [("dist-dir=", "d", "folder of the wheel")]  # noqa: RUF012

    def initialize_options(self):
        self.dist_dir = "dist"

    def finalize_options(self):
        pass

    def run(self):
        self.run_command("build")
        self.run_command("egg_info")
        content = self.get_finalized_command("build").build_lib
        name = f"{self.distribution.get_name().replace('-', '_')}-{self.distribution.get_version()}"
        pure = not self.distribution.has_ext_modules()
        python = "cp{}{}".format(*sys.version_info)
        machine = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        tag = "py3-none-any" if pure else f"{python}-{python}-{machine}"
        os.makedirs(self.dist_dir, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            egg = shutil.copytree(self.get_finalized_command("egg_info").egg_info, f"{folder}/egg")
            about = f"{folder}/wheel/{name}.dist-info"
            self.egg2dist(egg, about)
            with open(f"{about}/WHEEL", "w", encoding="utf-8") as file:
                file.write(
                    f"Wheel-Version: 1.0\nGenerator: lottery_sparse build_backend\n"
                    f"Root-Is-Purelib: {str(pure).lower()}\nTag: {tag}\n"
                )
            with zipfile.ZipFile(
                os.path.join(self.dist_dir, f"{name}-{tag}.whl"), "w", zipfile.ZIP_DEFLATED
            ) as wheel:
                record = "".join(_added(wheel, part) for part in (content, f"{folder}/wheel"))
                wheel.writestr(f"{name}.dist-info/RECORD", f"{record}{name}.dist-info/RECORD,,\n")

    def egg2dist(self, egg, folder):
        """Turns the metadata of an egg into those of a wheel (the name setuptools calls)."""
        os.makedirs(folder, exist_ok=True)
        for name in ("entry_points.txt", "top_level.txt"):
            if os.path.exists(f"{egg}/{name}"):
                shutil.copy(f"{egg}/{name}", folder)
        for path in self.distribution.metadata.license_files or ():
            shutil.copy(path, folder)
        with open(f"{egg}/PKG-INFO", encoding="utf-8") as file:
            head, _, description = file.read().partition("\n\n")
        required = []
        if "\nRequires-Dist:" not in head and os.path.exists(f"{egg}/requires.txt"):  # before 68.1
            with open(f"{egg}/requires.txt", encoding="utf-8") as file:
                required = list(_requirements(file))
        with open(f"{folder}/METADATA", "w", encoding="utf-8") as file:
            file.write("\n".join([head, *required]) + "\n\n" + description)
        shutil.rmtree(egg)


def _requirements(lines):
    """The lines of requires.txt, whose sections are [extra:marker], as those of METADATA."""
    conditions = []
    for line in filter(None, map(str.strip, lines)):
        if line.startswith("["):
            extra, _, marker = line[1:-1].partition(":")
            conditions = [f"({marker})"] * bool(marker) + [f'extra == "{extra}"'] * bool(extra)
        else:
            condition = f"; {' and '.join(conditions)}" if conditions else ""
            yield f"Requires-Dist: {line}{condition}"


def _added(wheel, folder):
    """Puts the files of a folder into a wheel; their lines of RECORD."""
    lines = []
    for where, _, names in sorted(os.walk(folder)):
        for name in sorted(names):
            path = os.path.join(where, name)
            inside = os.path.relpath(path, folder).replace(os.sep, "/")
            wheel.write(path, inside)
            with open(path, "rb") as file:
                content = file.read()
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=")
            lines.append(f"{inside},sha256={digest.decode()},{len(content)}\n")
    return "".join(lines)
