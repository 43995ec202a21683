"""When float32 products of Triton kernels run on TF32: where torch's own of the kind may."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# each way of telling torch, and whether matrix products and convolutions may then use TF32
WAYS = {
    "pass": (False, True),
    "products.allow_tf32 = True": (True, True),
    "products.allow_tf32 = True; products.allow_tf32 = False": (False, True),
    "torch.set_float32_matmul_precision('high')": (True, True),
    "torch.set_float32_matmul_precision('highest')": (False, True),
    "products.fp32_precision = 'tf32'": (True, True),
    "products.fp32_precision = 'ieee'": (False, True),
    "products.allow_tf32 = True; products.fp32_precision = 'ieee'": (False, True),
    "torch.backends.fp32_precision = 'tf32'": (True, True),
    "torch.backends.fp32_precision = 'tf32'; products.fp32_precision = 'ieee'": (False, True),
    "torch.backends.fp32_precision = 'ieee'": (False, False),
    "torch.backends.cudnn.fp32_precision = 'ieee'": (False, False),
    "torch.backends.cudnn.allow_tf32 = False": (False, False),
    "convolutions.fp32_precision = 'ieee'": (False, False),
}

# torch's switches are of a process, and some cannot be taken back: each way has a fork of its own
PROGRAM = """
import json, os, sys, torch
from lottery_sparse.tools.doctor import tf32
from lottery_sparse.ops.triton import tiles

products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn.conv

def found(dtype=torch.float32):
    return [tiles.precision(dtype, conv)["PRECISION"] == "tf32" for conv in (False, True)]

def inside(allowed):
    with tf32(allowed):
        assert products.allow_tf32 == torch.backends.cudnn.allow_tf32 == allowed  # can be read
        return found()

for way in json.loads(sys.argv[1]):
    if os.fork() == 0:
        exec(way)
        of_halves = found(torch.float16)
        print(json.dumps([way, found(), of_halves, inside(True), inside(False), found()]))
        sys.stdout.flush()
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def decided() -> dict[str, list]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error", "-c", PROGRAM, json.dumps(list(WAYS))]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {way: found for way, *found in rows} | {"": [done.stderr]}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_telling_torch_is_understood(decided, way):
    assert way in decided, decided[""]
    found, of_halves, allowed, refused, after = decided[way]
    assert found == list(WAYS[way])
    assert of_halves == [False, False]  # 16-bit products have no such choice
    # what benchmarks set for a while, and put back
    assert (allowed, refused, after) == ([True, True], [False, False], list(WAYS[way]))
