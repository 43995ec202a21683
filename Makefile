# `make quickstart` and `make test` set up a fresh machine by themselves and do their job;
# a second run starts within seconds. `make help` lists the rest.

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip -qq --disable-pip-version-check
OUT    := out

# The stamp's name says which kind of build it stands for, so that a compiler installed later
# triggers the native build.
COMPILER     := $(firstword $(foreach cxx,$(CXX) g++ clang++ c++,$(shell command -v $(cxx) 2>/dev/null)))
REQUIREMENTS := $(VENV)/.requirements-installed
PACKAGE      := $(VENV)/.package-$(if $(COMPILER),native,pure)
CSRC         := $(wildcard csrc/*/*)
SOURCES      := $(filter %.cpp %.h %.cu %.cuh,$(CSRC)) $(wildcard benchmarks/*/*.cpp benchmarks/*/*.h tests/cuda_host/*.cpp tests/cuda_host/*.h)

.DEFAULT_GOAL := help
.PHONY: help venv quickstart test test-everywhere lint format size bench bench-peers instructions compile-gate build clean distclean cuda-build sanitize
.DELETE_ON_ERROR:

help:  ## list the targets
	@echo "lottery_sparse: make TARGET"
	@sed -n 's/^\([a-z-]*\):.*##  */  \1 /p' Makefile | awk '{n = $$1; $$1 = ""; printf "  %-14s%s\n", n, $$0}'

venv: $(PACKAGE)  ## create .venv: tested versions, this package, and its kernels where a compiler is found

quickstart: $(PACKAGE)  ## train LeNet, find a ticket, print and draw what it shows (out/quickstart.*)
	@mkdir -p $(OUT)
	$(PY) -m experiments quickstart --json $(OUT)/quickstart.json --png $(OUT)/quickstart.png

test: $(PACKAGE)  ## run the tests (PYTEST_ARGS="-k masks" to choose)
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder --benchmark-disable $(PYTEST_ARGS)

test-everywhere: $(PACKAGE)  ## run the tests of arithmetic under every setting (SETTINGS="avx2 held" to choose)
	$(PY) tests/everywhere.py $(SETTINGS)

lint: $(PACKAGE)  ## ruff, clang-format and pyright; changes nothing
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	@$(if $(SOURCES),$(VENV)/bin/clang-format --dry-run -Werror $(SOURCES))
	$(VENV)/bin/pyright

format: $(PACKAGE)  ## rewrite the sources in the house style
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	@$(if $(SOURCES),$(VENV)/bin/clang-format -i $(SOURCES))

size:  ## lines of code per folder; fail where a folder is over its budget in tests/house/size.txt
	@$(if $(wildcard $(PY)),$(PY),$(PYTHON)) tests/house/size.py

bench: $(PACKAGE)  ## measure the kernels on this CPU against dense
	$(PY) -m benchmarks cpu

bench-peers: $(PACKAGE)  ## install the libraries that `make bench` compares with, where it can
	@for peer in sparselab torchao sparseprop; do \
	  $(PIP) install -c constraints.txt --no-deps --no-build-isolation $$peer || echo "$$peer was not installed"; \
	done
	@$(PY) -m benchmarks.cpu.peers

instructions: $(PACKAGE)  ## count the instructions of the kernels (valgrind), fail over +3%
	$(PY) -m benchmarks.compile.instructions

compile-gate: $(PACKAGE)  ## compile every Triton kernel for sm_80 and sm_90 (no GPU needed); stores registers, spills, ...
	$(PY) -m benchmarks.compile.gate

build: $(REQUIREMENTS)  ## build the kernels again, with the compiler's output shown
	$(PY) -m lottery_sparse build

# gcc's sanitizers: torch and Python are not built with them, so the library is loaded first. A report
# ends the process that made it. The sanitized package goes before the installed one.
SANITIZERS  := address,undefined
SANITIZED   := build/sanitize/lib
SANITIZE_ENV = LD_PRELOAD="$(shell g++ -print-file-name=libasan.so) $(shell g++ -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=1 \
  PYTHONPATH=$(abspath $(SANITIZED)):$(CURDIR)/tests/problems
SANITIZE_TESTS := bf16_linear compact_conv2d compact_linear compact_node keep_top lists masked_node \
  masked_conv2d masked_linear masks_bits native optim optim_compact packed_ops random sample_mask \
  supermask_node supermask_step threads train_step

sanitize: $(PACKAGE)  ## build the CPU kernels with sanitizers into build/sanitize and run the tests of kernels on them (g++)
	CXX=g++ LS_SANITIZE=$(SANITIZERS) LS_BUILD=require $(PY) setup.py -q build --build-base build/sanitize --build-lib $(SANITIZED)
	cd $(SANITIZED) && $(SANITIZE_ENV) $(abspath $(PY)) $(CURDIR)/tests/cuda_host/guard_pages.py avx512 avx2 portable
	cd $(SANITIZED) && $(SANITIZE_ENV) $(abspath $(PY)) -m pytest -q -n 2 --dist loadfile --capture=no --benchmark-disable -c $(CURDIR)/pyproject.toml \
	  -m 'not slow' $(PYTEST_ARGS) $(foreach name,$(SANITIZE_TESTS),$(wildcard $(CURDIR)/tests/*/test_$(name).py $(CURDIR)/tests/*/*/test_$(name).py))

# A venv of its own with a CUDA build of torch, which imports without a GPU, and so does what is built
# against it. pip prefers a CPU build where it is configured to find one: then the check names it.
CUDA_PY    := build/cuda-venv/bin/python
CUDA_TORCH := torch==2.13.0

cuda-build:  ## build _C_cuda against a CUDA build of torch and import it (downloads several GB)
	@test -x $(CUDA_PY) || $(PYTHON) -m venv build/cuda-venv
	$(CUDA_PY) -m pip -qq --disable-pip-version-check install $(CUDA_TORCH)
	@$(CUDA_PY) -c 'import sys, torch; sys.exit(None if torch.version.cuda else f"pip chose torch {torch.__version__}, no CUDA build: run it with PIP_CONFIG_FILE=/dev/null, or set CUDA_TORCH to a wheel of one")'
	$(CUDA_PY) -m pip -qq --disable-pip-version-check install -c constraints.txt numpy safetensors setuptools wheel pybind11 ninja
	LS_BUILD=require $(CUDA_PY) setup.py -q build --build-base build/cuda --build-lib build/cuda-lib
	cd build/cuda-lib && ../../$(CUDA_PY) -c 'from lottery_sparse.ops.packed import cuda; from lottery_sparse.tools import doctor; print(doctor.cuda_line())'

clean:  ## remove what builds and runs leave behind (.venv stays)
	rm -rf build dist *.egg-info lottery_sparse/*.so $(OUT) .pytest_cache .ruff_cache .hypothesis
	rm -f $(VENV)/.package-*
	find lottery_sparse experiments benchmarks tests -name __pycache__ -prune -exec rm -rf {} +

distclean: clean  ## … and .venv
	rm -rf $(VENV)

# Prints the option that makes pip take the CPU build of torch (some hundred MB instead of several GB):
# on Linux without an NVIDIA GPU, where PyTorch's own index answers. Otherwise nothing, and pip
# takes torch from wherever it is configured to look. An index that is asked beside the default one
# could answer for any package, with one of the same name; so a call of its own asks PyTorch's index
# for torch alone, without what torch needs, and the next call finds torch there and takes the rest.
define TORCH_INDEX
import shutil, subprocess, sys, urllib.request

CPU = "https://download.pytorch.org/whl/cpu"

def has_gpu():
    smi = shutil.which("nvidia-smi")
    return bool(smi) and b"GPU" in subprocess.run([smi, "-L"], capture_output=True).stdout

def answers():
    try:
        return urllib.request.urlopen(CPU + "/torch/", timeout=3).status == 200
    except OSError:
        return False

if sys.platform == "linux" and not has_gpu() and answers():
    print("--index-url", CPU)
endef
export TORCH_INDEX

$(PY):
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON) here: install Python 3.10 or newer, or name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "lottery_sparse needs Python 3.10 or newer, but $(PYTHON) is `$(PYTHON) --version`: name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "$(PYTHON) cannot create virtual environments: install its venv module (on Debian and Ubuntu: apt-get install python3-venv)." >&2; exit 1; }
	@echo "creating $(VENV) with `$(PYTHON) --version`"
	@$(PYTHON) -m venv $(VENV)

$(REQUIREMENTS): constraints.txt pyproject.toml | $(PY)
	@echo "installing torch and the build tools; the first time this downloads some hundred MB"
	@index=`$(PY) -c "$$TORCH_INDEX"`; test -z "$$index" || $(PIP) install -c constraints.txt --no-deps $$index torch
	@$(PIP) install -c constraints.txt torch numpy setuptools wheel pybind11 ninja
	@echo "installing the tools of experiments and tests"
	@LS_BUILD=0 $(PIP) install -c constraints.txt --no-build-isolation -e '.[experiments,cluster,test,triton]'
	@touch $@

# pip hides what setup.py prints, so the package itself says what was built.
$(PACKAGE): $(REQUIREMENTS) setup.py $(CSRC)
	@echo "installing lottery_sparse$(if $(COMPILER), and building its kernels with $(COMPILER), (no C++ compiler found: pure Python))"
	@$(PIP) install --no-build-isolation --no-deps -e .
	@$(PY) -c 'from lottery_sparse.tools import doctor; print(doctor.native_line())'
	@touch $@
