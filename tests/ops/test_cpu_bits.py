"""The CPU kernels give the same bits on AVX2 and AVX-512, and those that `numerics` 1 gave first.

cpu_bits.py prints digests, in a process for each setting, as a process has one kernel variant.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from lottery_sparse.ops import dispatch

if not dispatch.built("cpu"):
    pytest.skip("the native kernels (lottery_sparse._C) are not built", allow_module_level=True)
PROBLEMS = Path(__file__).resolve().parents[1] / "problems"
FIRST = PROBLEMS / "cpu_bits_numerics_1.txt"  # of the AVX-512 kernels at 21bf4ea
# of these no sum is rounded, or none in another order: equal under every `numerics`
WHOLE = ("int8", "keep_top", "sample_mask", "random", "pack_mask", "unpack_mask")


@cache
def digests(variant: str, threads: int = 1) -> dict[tuple[str, str], str]:
    """(group, call) -> digest."""
    kept = {k: v for k, v in os.environ.items() if k != "LS_BACKEND"}
    path = os.pathsep.join(
        [
            str(PROBLEMS.parents[1]),
            str(PROBLEMS.parent / "cuda_host"),
            os.environ.get("PYTHONPATH", ""),
        ]
    )
    done = subprocess.run(
        [sys.executable, PROBLEMS / "cpu_bits.py", str(threads)],
        env=kept | {"LS_CPU": variant, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    if "this machine can run" in done.stderr:
        pytest.skip(f"this machine cannot run {variant}")
    assert done.returncode == 0, done.stderr
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    return {(group, call): digest for group, call, digest in lines}


def different(a: dict, b: dict) -> list:
    assert a.keys() == b.keys()
    assert len(a) > 500
    return [call for call in a if a[call] != b[call]]


@pytest.mark.slow
def test_avx2_and_avx512_give_the_same_bits():
    assert not different(digests("avx2"), digests("avx512"))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["portable", "avx2", "avx512"])
def test_the_number_of_threads_changes_no_bit(variant):
    assert not different(digests(variant), digests(variant, threads=2))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["avx2", "avx512"])
def test_numerics_1_is_what_it_was(variant):
    found = {call: d for (group, call), d in digests(variant).items() if group == "own"}
    first = dict(line.rsplit("\t", 1) for line in FIRST.read_text().splitlines())
    assert found == first


@pytest.mark.slow
def test_kernels_that_round_no_sum_are_equal_everywhere():
    portable, best = digests("portable"), digests("avx2")
    unequal = different(portable, best)
    assert unequal, "portable code has a numerics of its own"
    whole = [call for call in portable if any(word in call[1] for word in WHOLE)]
    assert len(whole) > 50
    assert not set(whole) & set(unequal)
