"""What is installed, which kernels are built, which backend each op takes and why, and whether
every backend agrees with the reference here, and every optimizer with torch's.
`python -m lottery_sparse doctor [--json]`.

The report holds versions, flags and verdicts, no paths and no other environment variables, so it
can be pasted into an issue.
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import importlib.util
import os
import platform
from itertools import takewhile
from typing import Any

import torch

import lottery_sparse
from lottery_sparse.ops import dispatch
from lottery_sparse.ops.common.eager import node_module
from lottery_sparse.tools import doctor_steps, doctor_torch
from lottery_sparse.tools.doctor_cases import CARRY, CASES, tf32, to
from lottery_sparse.tools.doctor_steps import FAILED

# How to get the kernels, one sentence for every place that says they are missing (design D17).
HOW_TO_BUILD = (
    "run `make venv`, `python -m lottery_sparse build` or `pip install --no-build-isolation .` in "
    "a checkout, with a C++ compiler, against the installed torch"
)

# variable -> what it does; its value is shown unless it may name a folder of the user
SWITCHES = {
    "LS_BACKEND": "forces one backend for every op",
    "LS_CPU": "forces the instruction set of the CPU kernels",
    "LS_BUILD": "auto, 0 or require: whether setup.py builds the kernels",
    "LS_DATA_DIR": "where the experiments find MNIST and CIFAR-10",
}
PRIVATE = {"LS_DATA_DIR"}

# Float results may differ by the order of a sum of at most 300 products of order one.
TOLERANCE = 1e-4


def report() -> dict[str, Any]:
    """Everything the doctor knows, as plain data.

    `healthy` is False when something that is installed does not work: kernels that do not load, a
    switch that cannot be followed, a backend that disagrees with the reference.
    """
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    native = {name: _native(name) for name in ("_C", "_host", "_C_cuda", _node())}
    ops = {device: {op: _diagnose(op, device) for op in CASES} for device in devices}
    steps = {device: doctor_steps.verdicts(device) for device in devices}
    diagnoses = [found for by_op in ops.values() for found in by_op.values()]
    verdicts = [v for found in diagnoses for v in found["check"].values()]
    verdicts += [v for by_name in steps.values() for v in by_name.values()]
    healthy = (
        not any(part["error"] for part in native.values())
        and all(found["backend"] for found in diagnoses)
        and not any(verdict.startswith(FAILED) for verdict in verdicts)
    )
    return {
        "versions": _versions(),
        "machine": _machine(),
        "native": native,
        "wrong_bfloat16_convolutions_of_torch": doctor_torch.wrong_convolutions(),
        "switches": {name: _switch(name) for name in SWITCHES},
        "ops": ops,
        "steps": steps,
        "healthy": healthy,
    }


def native_line() -> str:
    """One sentence: are the compiled kernels here, and if not, why and how to get them."""
    kernels, host = _native("_C"), _native("_host")
    if error := kernels["error"] or host["error"]:
        return f"lottery_sparse has native kernels, but they do not work: {error}"
    if kernels["state"] == "missing":
        return f"lottery_sparse is pure Python here; to build its kernels, {HOW_TO_BUILD}."
    if host["state"] == "missing":
        return "lottery_sparse has its native kernels, but not _host, so their build is unknown."
    info = host["info"]
    built = f"lottery_sparse has its native kernels: {info['cpu_variant']}, {info['compiler']}"
    node = _native(_node())
    if node["state"] == "built":
        return f"{built}."
    missing = f"is not built for torch {torch.__version__}; {HOW_TO_BUILD}."
    why = f"does not work: {node['error']}" if node["error"] else missing
    return f"{built}; but the C++ node that makes compact layers quick {why}"


def cuda_line() -> str:
    """One sentence: are the CUDA kernels here, and if not, why."""
    found = _native("_C_cuda")
    if found["error"]:
        return f"lottery_sparse has CUDA kernels, but they do not work: {found['error']}"
    if found["state"] == "missing":
        why = "" if torch.version.cuda else f"; torch {torch.__version__} is no CUDA build"
        return f"no CUDA kernels: they are built where nvcc and a CUDA build of torch are{why}."
    return f"CUDA kernels for {found['info']['architectures']}."


# ---- what is installed -------------------------------------------------------------------------


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {
        "lottery_sparse": lottery_sparse.__version__,
        "python": platform.python_version(),
    }
    for name in ("torch", "numpy", "safetensors", "triton"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _machine() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "torch_cpu": torch.backends.cpu.get_cpu_capability(),
        "gpus": gpus,
    }


def _switch(name: str) -> str | None:
    value = os.environ.get(name)
    return "set" if value and name in PRIVATE else value


def _node() -> str:
    return node_module().rpartition(".")[2]


def _native(name: str) -> dict[str, Any]:
    """state: built, missing or broken; error: what the loader or the module said when broken."""
    found: dict[str, Any] = {"state": "missing", "error": None}
    if importlib.util.find_spec(f"lottery_sparse.{name}") is None:
        return found
    try:
        module = importlib.import_module(f"lottery_sparse.{name}")
        if name == "_host":
            found["info"] = module.build_info() | {"cpu_variant": module.cpu_variant()}
        if name == "_C":
            found["info"] = {"numerics": dispatch.numerics()}
        if name == "_C_cuda":
            found["info"] = {"architectures": module.architectures}
    except (ImportError, RuntimeError) as error:
        remedy = f" To build them anew, {HOW_TO_BUILD}." if isinstance(error, ImportError) else ""
        return {"state": "broken", "error": f"{error}{remedy}"}
    return found | {"state": "built"}


# ---- which backend, why, and whether it is right -----------------------------------------------


def _diagnose(op: str, device: str) -> dict[str, Any]:
    args = to(CASES[op](), device)
    chosen, why = _choice(op, device, args)
    names = [
        name
        for name, backend in dispatch.BACKENDS.items()
        if name != "reference"
        and dispatch.built(name)
        and (not backend.devices or device in backend.devices)
    ]
    verdicts = {name: _verdict(op, name, device, args) for name in names}
    check = {name: verdict for name, verdict in verdicts.items() if verdict is not None}
    return {"backend": chosen, "why": why, "check": check}


def _choice(op: str, device: str, args: tuple) -> tuple[str | None, str]:
    """The backend that `backends.kernel` gives the case, and why."""
    try:
        own = dispatch.own_arguments(op, args)
        module = dispatch.kernel(op, torch.device(device), own).__module__
    except (RuntimeError, ValueError, ImportError) as error:
        return None, str(error)
    chosen = module.rpartition(".")[2].partition("_")[0]  # a file is named by its backend
    if dispatch.forced():
        return chosen, "forced"
    wished = dispatch.PREFERENCE.get(device, {}).get(op, ())
    if not wished:
        return chosen, "no kernel is listed for it"
    passed = [_why_not(name, op, device, args) for name in takewhile(chosen.__ne__, wished)]
    return chosen, "; ".join(passed) if passed else "first choice"


def _why_not(name: str, op: str, device: str, args: tuple) -> str:
    if not dispatch.built(name):
        return f"{name} is not built"
    why = dispatch.why_not(name, op, torch.device(device), args)
    return why or f"{name} is not faster at this density"


def _verdict(op: str, name: str, device: str, args: tuple) -> str | None:
    """'ok', why the backend cannot run the case, or 'FAILED: ...'; None if it has no such op."""
    try:
        if dispatch.module_of(op, name) is None:
            return None
        why = dispatch.why_not(name, op, torch.device(device), args)
        if why is not None:
            return f"cannot run this case: {why}"
        ours, theirs = copy.deepcopy(args), copy.deepcopy(args)  # some ops write to them
        with tf32(False):  # which torch allows in convolutions, and TOLERANCE does not
            got = dispatch.run_on(name, op, *ours)
            expected = dispatch.run_on("reference", op, *theirs)
        if op in CARRY:
            (got, _), (expected, _) = got, expected
        pairs = (got, *_compared(ours)), (expected, *_compared(theirs))
        torch.testing.assert_close(*pairs, rtol=TOLERANCE, atol=TOLERANCE)
    except Exception as error:  # a self-check reports whatever goes wrong, it must not stop at it
        return f"{FAILED}: {' '.join(str(error).split())}"
    return "ok"


def _compared(args: tuple) -> list[Any]:
    return [a for a in args if not isinstance(a, torch.device)]


# ---- as text -----------------------------------------------------------------------------------


def as_text(report: dict[str, Any]) -> str:
    """The report for people: what is here, then one line per op."""
    versions = [f"{name} {version or '-'}" for name, version in report["versions"].items()]
    machine = report["machine"]
    gpus = ", ".join(machine["gpus"]) or "no GPU"
    lines = [
        f"versions   {' · '.join(versions)}",
        f"machine    {machine['system']}, {machine['cores']} cores, "
        f"{machine['torch_threads']} torch threads, torch uses {machine['torch_cpu']}, {gpus}",
        f"torch      {doctor_torch.line(report['wrong_bfloat16_convolutions_of_torch'])}",
        f"native     {native_line()}",
        f"cuda       {cuda_line()}",
        f"switches   {' · '.join(f'{k}={v or chr(45)}' for k, v in report['switches'].items())}",
    ]
    for device, ops in report["ops"].items():
        lines.append(f"ops on {device}")
        for op, found in ops.items():
            checks = ", ".join(f"{name} {verdict}" for name, verdict in found["check"].items())
            taken = found["backend"] or "none"
            lines.append(
                f"  {op:25} {taken:10} {found['why']}{'  [' + checks + ']' if checks else ''}"
            )
    for device, verdicts in report["steps"].items():
        lines.append(f"steps on {device}, beside torch's optimizers")
        lines += [f"  {name:25} {verdict}" for name, verdict in verdicts.items()]
    lines.append("healthy" if report["healthy"] else "NOT healthy: see the lines above")
    return "\n".join(lines)
