"""The CUDA kernels compile, spill nothing, and take what the committed table says."""

from __future__ import annotations

import json

import pytest

from benchmarks.compile import cuda_resources as gate

TABLE = json.loads(gate.RESULTS.read_text("utf-8"))
RENEW = "run python -m benchmarks.compile.cuda_resources, where nvcc is, and look at what changed"
# threads of a block: a multiprocessor has 65,536 registers, and each warp an equal part of them
THREADS = {
    "ternary_kernel": 2 * 8 * 32,
    "csr_kernel": 16 * 32,
    "add_kernel": 256,
    "compact_kernel": 512,
    "dvalues_kernel": 512,
    "finish_kernel": 256,
    "pack_kernel": 4 * 256,
    "scatter_kernel": 4 * 256,
    "sgd_kernel": 4 * 256,
    "adam_kernel": 4 * 256,
    "count_kernel": 128,
    "pack_bits_kernel": 8 * 256,
    "unpack_bits_kernel": 8 * 256,
    "parts_kernel": 256,
    "round_kernel": 256,
}


def test_the_table_is_of_these_sources():
    assert TABLE["source"] == gate.source_hash(), RENEW


@pytest.mark.parametrize("architecture", gate.ARCHITECTURES)
def test_no_kernel_spills_and_every_block_has_its_registers(architecture):
    for name, row in TABLE["kernels"][architecture].items():
        assert row["stack"] == row["spills"] == 0, name
        kernel, *rest = name.split()[1:]
        threads = THREADS.get(kernel) or int(rest[-1]) * 32
        if kernel == "compact_kernel":  # two blocks, where entries are read directly
            threads *= 1 + int(rest[-1])
        assert -(-row["registers"] // 8) * 8 * -(-threads // 128) * 128 <= 1 << 16, name


def test_nvcc_says_what_the_table_says_of_one_file():
    """The table is of these sources, so the rest of it was measured as well."""
    if gate.nvcc_version() is None:
        pytest.skip("nvcc is not installed here")
    if gate.nvcc_version() != TABLE["nvcc"]:
        pytest.skip(f"the table is of nvcc {TABLE['nvcc']}, here is {gate.nvcc_version()}")
    [path] = [path for path in gate.kernel_files() if path.stem == "compact_pack_cuda"]
    found = gate.measure("90a", [path])
    expected = {
        name: row
        for name, row in TABLE["kernels"]["90a"].items()
        if name.split()[0] == "compact_pack"
    }
    assert expected
    for row in (*found.values(), *expected.values()):
        del row["loop"]  # cuobjdump need not be here
    assert found == expected, RENEW
