"""The tests marked `numeric` under every setting that changes arithmetic: `make test-everywhere`.

`python tests/everywhere.py [NAME ...]` runs the settings of these names, or all, prints a table of
them and their seconds, and ends with an error if one failed. Where the processor lacks an
instruction set, the table says so.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

# Of the dense libraries, MKL and oneDNN, and of torch's own loops.
HELD = {
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
}
# Waiting threads give up their core, which the other worker needs.
TWO_THREADS = {"LS_TEST_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}

# name -> environment variables
SETTINGS: dict[str, dict[str, str]] = {
    "avx512": {"LS_CPU": "avx512"},
    "avx2": {"LS_CPU": "avx2"},
    "portable": {"LS_CPU": "portable"},
    "held": HELD,
    "threads": TWO_THREADS,
    "avx2-held-threads": {"LS_CPU": "avx2", **HELD, **TWO_THREADS},
    "portable-held": {"LS_CPU": "portable", **HELD},
}
# Not what asks torch about schemas, nor what runs every instruction set by itself.
ALIKE = "opcheck", "every_variant", "every_cpu_variant", "every_instruction_set"
PYTEST = (
    "-m", "pytest", "-q", "-m", "numeric", "-k", " and ".join(f"not {name}" for name in ALIKE),
    "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", "--benchmark-disable",
)  # fmt: skip
# Whole files are marked; the others need not be collected.
TESTS = Path(__file__).parent
FILES = [str(p) for p in sorted(TESTS.rglob("test_*.py")) if "pytest.mark.numeric" in p.read_text()]


def lacks(name: str) -> str | None:
    """Why kernels of the instruction set that a setting names do not run here; None if they do."""
    if "LS_CPU" not in SETTINGS[name]:
        return None
    code = "from lottery_sparse import _host; print(_host.cpu_variant())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | SETTINGS[name],
        text=True,
        capture_output=True,
    )
    return done.stderr.splitlines()[-1].partition(": ")[2] if done.returncode else None


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in SETTINGS]
    if unknown:
        print(f"there is no setting {unknown[0]}; settings: {', '.join(SETTINGS)}", file=sys.stderr)
        return 2
    rows = []
    for name in names or list(SETTINGS):
        shown = " ".join(f"{k}={v}" for k, v in SETTINGS[name].items())
        print(f"\n{name}: {shown}", flush=True)
        why = lacks(name)
        if why is not None:
            rows.append((name, "-", f"not run: {why}"))
            continue
        command = [sys.executable, *PYTEST, *FILES]
        start = time.monotonic()
        environment = os.environ | SETTINGS[name]
        failed = subprocess.run(command, cwd=TESTS.parent, env=environment).returncode
        seconds = f"{time.monotonic() - start:.0f} s"
        rows.append((name, seconds, "FAILED" if failed else "passed"))
    print(f"\n{'setting':18} {'time':>6}  result")
    for name, seconds, result in rows:
        print(f"{name:18} {seconds:>6}  {result}")
    return int(any(result == "FAILED" for _, _, result in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
