"""Builds the native kernels where it can; metadata is in pyproject.toml.

LS_BUILD=auto     (default) build if torch and a C++ compiler are found, else a pure-Python package
LS_BUILD=0        never build
LS_BUILD=require  build, or fail with the reason
MAX_JOBS=n        parallel compilations; unset: bounded by processors and free memory
LS_SANITIZE=names build the kernels for the CPU with -fsanitize=names, such as address,undefined, in
                  a folder of its own; `make sanitize` does and runs tests on them

The kernels for NVIDIA GPUs (_C_cuda) are built too where nvcc and a CUDA build of torch are found:
CUDA_HOME             the toolkit; unset: that of the nvcc on the path
TORCH_CUDA_ARCH_LIST  what to compile for, from 8.0 on; unset: 8.0;9.0a;10.0+PTX
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from typing import ClassVar

from build_backend import NEWER, NO_WHEEL, VERSION, BdistWheel  # says so if setuptools is missing

# isort: split
from setuptools import Extension, setup

METADATA = {"license_expression" if VERSION >= (77, 0) else "license": "Apache-2.0"}
FLAGS = [
    "-O3",
    "-std=c++20",
    "-fvisibility=hidden",
    "-ffp-contract=off",  # a multiply-add is fused where the source says so: same bits everywhere
    "-g0",
    "-Wall",
    "-Wno-maybe-uninitialized",  # false alarms inside gcc's own AVX-512 headers
    "-Wno-unknown-warning-option",  # clang does not have that one
]
SANITIZE = os.environ.get("LS_SANITIZE", "")
if SANITIZE:  # a report ends the process; vptr asks for type information that torch hides
    FLAGS[:] = [flag for flag in FLAGS if flag not in ("-O3", "-g0")]
    FLAGS += ["-O1", "-g1", "-fno-omit-frame-pointer", "-D_GLIBCXX_ASSERTIONS"]
    FLAGS += [f"-fsanitize={SANITIZE}", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
LINK_FLAGS = [f"-fsanitize={SANITIZE}"] if SANITIZE else []
STABLE_ABI_TARGET = "0x020b000000000000"  # torch 2.11
OLDEST_TORCH = (2, 11)
BYTES_PER_JOB = 3 << 29  # what one compilation may need: 1.5 GiB

CUDA_FLAGS = ["-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
CUDA_ARCHITECTURES = "8.0;9.0a;10.0+PTX"
X86 = platform.machine().lower() in ("x86_64", "amd64")
AVX2 = ["-mavx2", "-mfma", "-mbmi", "-mbmi2", "-mpopcnt"]
VARIANTS = {"portable": []}
if X86:
    VARIANTS["avx2"] = AVX2
    VARIANTS["avx512"] = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]


def sources(*patterns, but=()):
    """Files of csrc/ by their names, the rule of csrc/README.md."""
    found = sorted({path for pattern in patterns for path in glob(f"csrc/*/{pattern}")})
    return [path for path in found if path not in but]


KERNELS = sources("*_cpu.cpp")  # compiled once per instruction set, see csrc/common/variants.h
CUDA_KERNELS = sources("*_cuda.cu")  # pointers only, so that nvcc needs seconds
CUDA_RIM = sources("bindings_cuda*.cpp")
HOST_RIM = sources("host.cpp")
EAGER_RIM = sources("eager*.cpp")
RIM_AND_DRIVERS = sources("*.cpp", but=[*KERNELS, *CUDA_RIM, *HOST_RIM, *EAGER_RIM])
EAGER_DRIVERS = sources(
    "compact_linear.cpp", "sparse_linear.cpp", "masked_optim.cpp", "variants.cpp"
)


def free_memory():
    try:
        with open("/proc/meminfo") as lines:
            fields = dict(line.split(":") for line in lines)
        return int(fields["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return BYTES_PER_JOB * (os.cpu_count() or 1)


def find_compiler():
    """The C++ compiler torch's build will call: $CXX, else c++; others are put into $CXX."""
    named = os.environ.get("CXX")
    if named:
        return shutil.which(named.split()[0])
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if found and not shutil.which("c++"):
        os.environ["CXX"] = found
    return found


def why_not():
    """Why no native build is possible here, or None."""
    if os.name != "posix":
        return f"the kernels are not built on {platform.system()}"
    try:
        import torch
    except ImportError as error:
        return (
            f"torch cannot be imported while building ({error}); "
            "install torch first and use pip install --no-build-isolation"
        )
    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        return f"torch is {torch.__version__}, the kernels need 2.11 or newer"
    compiler = find_compiler()
    if not compiler:
        return "no C++ compiler was found ($CXX, c++, g++, clang++)"
    return compiler_fails(compiler)


def compiler_fails(compiler):
    """What the compiler says to a C++20 file with Python's headers, or None if it takes it."""
    command = [compiler, "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
    command += [f"-I{path}" for path in {sysconfig.get_path(p) for p in ("include", "platinclude")}]
    program = "#include <Python.h>\n#include <concepts>\n"
    try:
        done = subprocess.run(command, input=program, text=True, capture_output=True)
    except OSError as error:
        return f"{compiler} does not run: {error}"
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    said = next((line for line in lines if "error" in line), f"exit status {done.returncode}")
    return f"{compiler} cannot compile C++20 with Python's headers: {said}"


# ---- CUDA --------------------------------------------------------------------------------------


def cuda_toolkit():
    """Folder of the CUDA toolkit, or None. The nvcc on the path may be a script in another one."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = os.path.join(home, "bin", "nvcc") if home else shutil.which("nvcc")
    if not nvcc or not os.path.isfile(nvcc):
        return None
    command = [nvcc, "--dryrun", "-x", "cu", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True).stderr
    where = re.search(r"^#\$ _HERE_=(.+)$", said, re.MULTILINE)
    return os.path.dirname(where[1].strip()) if where else home


def cuda_architectures():
    """Compute capabilities to compile for: "8.0", "9.0a", or "10.0+PTX" for newer ones as well."""
    listed = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES)
    return [name for name in listed if re.fullmatch(r"([89]|\d\d)\.\d[af]?(\+PTX)?", name)]


def cuda_targets(architectures):
    """nvcc's options for them."""
    options = []
    for name in architectures:
        number = name.removesuffix("+PTX").replace(".", "")
        code = f"[sm_{number},compute_{number}]" if name.endswith("+PTX") else f"sm_{number}"
        options.append(f"-gencode=arch=compute_{number},code={code}")
    return options


def why_no_cuda():
    """Why no kernels for NVIDIA GPUs are built here, or None."""
    import torch

    if not torch.version.cuda:
        return f"torch {torch.__version__} is no CUDA build"
    if not cuda_toolkit():
        return "nvcc was not found ($CUDA_HOME, or nvcc on the path)"
    if not cuda_architectures():
        return "TORCH_CUDA_ARCH_LIST names no capability from 8.0 on, such as 8.0, 9.0a or 10.0+PTX"
    return None


def compile_cuda(folder):
    """The objects of CUDA_KERNELS."""
    nvcc = os.path.join(cuda_toolkit(), "bin", "nvcc")
    os.makedirs(folder, exist_ok=True)

    def compile_one(path):
        made = os.path.join(folder, f"{os.path.basename(path)[:-3]}.o")
        options = [*CUDA_FLAGS, *cuda_targets(cuda_architectures())]
        command = [nvcc, *options, "-c", "-Icsrc", path, "-o", made]
        print(" ".join(command), flush=True)
        subprocess.run(command, check=True)
        return made

    with ThreadPoolExecutor(int(os.environ["MAX_JOBS"])) as jobs:
        return list(jobs.map(compile_one, CUDA_KERNELS))


# ---- the build ---------------------------------------------------------------------------------


def native(required):
    """(ext_modules, cmdclass) of the native build."""
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

    try:
        import pybind11

        pybind_include = [pybind11.get_include()]
    except ImportError:
        pybind_include = include_paths()  # torch carries a copy of pybind11's headers

    class BuildKernels(BuildExtension):
        kernels: ClassVar = []  # objects that _C and _eager link

        def finalize_options(self):
            super().finalize_options()
            if SANITIZE:  # objects of the usual build stay what they are
                self.build_temp = os.path.join(self.build_temp, "sanitize")

        def build_extension(self, ext):
            try:
                if ext.name.endswith("._C_cuda"):
                    ext.extra_objects = compile_cuda(os.path.join(self.build_temp, "cuda"))
                elif not ext.name.endswith("._host"):
                    ext.extra_objects = self.compile_kernels(ext)
                super().build_extension(ext)
            except Exception as error:
                if required:
                    raise
                # setuptools goes on without an optional extension
                print(
                    f"lottery_sparse: going on without {ext.name}, which failed to build: {error}"
                )

        def compile_kernels(self, ext):
            """torch's ninja files hold one set of flags, so each variant is a run of its own."""
            if self.kernels:  # _C and _eager link the same objects
                return self.kernels
            objects = self.kernels
            for variant, flags in VARIANTS.items():
                objects += self.compiler.compile(
                    KERNELS,
                    output_dir=os.path.join(self.build_temp, variant),
                    macros=[*ext.define_macros, ("LS_VARIANT", variant)],
                    include_dirs=ext.include_dirs,
                    extra_postargs=ext.extra_compile_args["cxx"] + flags,
                )
            return objects

    os.environ.setdefault(
        "MAX_JOBS", str(max(1, min(os.cpu_count() or 1, free_memory() // BYTES_PER_JOB)))
    )
    # torch's checks name the file that they are in: csrc/rim/rim.h, not where it was built
    root = os.path.dirname(os.path.abspath(__file__))
    csrc = os.path.join(root, "csrc")  # where the paths in #include "..." begin
    folders = root, os.path.join(os.path.dirname(torch.__file__), "include")
    cxx = [*FLAGS, *(f"-ffile-prefix-map={folder}/=" for folder in folders)]
    macros = [("TORCH_TARGET_VERSION", STABLE_ABI_TARGET), ("LS_X86_VARIANTS", str(int(X86)))]
    kernels = CppExtension(
        "lottery_sparse._C",
        RIM_AND_DRIVERS,
        include_dirs=[csrc],
        define_macros=macros,
        extra_compile_args={"cxx": cxx},
        extra_link_args=LINK_FLAGS,
        py_limited_api=True,
        optional=not required,
    )
    # torch's C++ interface is no stable ABI, so the module's name says which version it is for
    version = "".join(c if c.isalnum() else "_" for c in torch.__version__.split("+")[0])
    eager = CppExtension(
        f"lottery_sparse._eager_{version}",
        [*EAGER_RIM, *EAGER_DRIVERS],
        include_dirs=[csrc],
        define_macros=[*macros[1:], ("LS_EAGER", f"_eager_{version}")],
        extra_compile_args={"cxx": cxx},
        extra_link_args=LINK_FLAGS,
        optional=True,
    )
    flags = "; ".join([" ".join(FLAGS), *(f"{v}: {' '.join(f)}" for v, f in VARIANTS.items() if f)])
    host = Extension(
        "lottery_sparse._host",
        [*HOST_RIM, *sources("variants.cpp")],
        include_dirs=[csrc, *pybind_include],
        define_macros=[*macros, ("LS_BUILD_FLAGS", f'"{flags}"')],
        extra_compile_args={"cxx": cxx},
        extra_link_args=LINK_FLAGS,
        language="c++",
        optional=not required,
    )
    modules = [kernels, eager, host]
    if not SANITIZE and not why_no_cuda():
        modules.append(cuda_extension(CppExtension, csrc, macros, required))
    return modules, {"build_ext": BuildKernels}


def cuda_extension(CppExtension, csrc, macros, required):
    toolkit = cuda_toolkit()
    return CppExtension(
        "lottery_sparse._C_cuda",
        CUDA_RIM,
        define_macros=[*macros, ("LS_CUDA_ARCHITECTURES", f'"{" ".join(cuda_architectures())}"')],
        extra_compile_args={"cxx": FLAGS},
        include_dirs=[csrc, os.path.join(toolkit, "include")],
        library_dirs=[os.path.join(toolkit, "lib64"), os.path.join(toolkit, "lib")],
        # the runtime is linked in: a toolkit may be of another version than torch's own
        libraries=["torch_cuda", "cudart_static", "rt", "dl", "pthread"],
        py_limited_api=True,
        optional=not required,
    )


def main():
    mode = os.environ.get("LS_BUILD", "auto")
    if mode not in ("auto", "0", "require"):
        sys.exit(f"LS_BUILD is {mode!r}; it must be auto, 0 or require.")
    commands = {"bdist_wheel": BdistWheel} if NO_WHEEL else {}
    if NO_WHEEL and "editable_wheel" in sys.argv:
        sys.exit(f"pip install -e needs the package wheel beside this setuptools; {NEWER}")
    reason = "LS_BUILD=0" if mode == "0" else why_not()
    if reason and mode == "require":
        sys.exit(f"LS_BUILD=require, but {reason}.")
    if reason:
        print(f"lottery_sparse: pure Python, no native kernels: {reason}.", file=sys.stderr)
        return setup(cmdclass=commands, **METADATA)
    ext_modules, cmdclass = native(required=mode == "require")
    return setup(ext_modules=ext_modules, cmdclass=cmdclass | commands, **METADATA)


main()
