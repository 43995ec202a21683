"""The library of the CUDA C++ kernels, lottery_sparse._C_cuda, and the devices that they run on.

ImportError means that it is not built.
"""

from __future__ import annotations

import re
from functools import cache

import torch

import lottery_sparse._C_cuda as _built  # pyright: ignore[reportMissingImports]
from lottery_sparse.ops.common.torch_private import cuda_driver


@cache
def fails_on(device: torch.device) -> str | None:
    """Why no kernel runs on this GPU, in a sentence: its architecture, or the driver."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA device here, or none with a driver that it can use."
    capability = torch.cuda.get_device_capability(device)
    if not runs_on(_built.architectures, capability):
        return (
            f"it is built for compute capabilities {_built.architectures}, and {device} has "
            f"{capability[0]}.{capability[1]}; set TORCH_CUDA_ARCH_LIST and build again."
        )
    # of one major version, code runs on older drivers, too; what PTX needs, a launch says itself
    driver = cuda_driver()
    if driver // 1000 < _built.toolkit // 1000:
        return (
            f"it is built with CUDA {_version_text(_built.toolkit)}, and the driver is for CUDA "
            f"{_version_text(driver)}; update the driver, or build again with an older toolkit."
        )
    return None


def _version_text(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def runs_on(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether code compiled for e.g. "8.0 9.0a 10.0+PTX" runs on a device of this capability.

    Machine code runs on later minor versions, architecture-specific code (9.0a) on its own
    version only, and PTX on whatever is newer.
    """
    for name in architectures.split():
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        assert found is not None, name
        built = int(found[1]), int(found[2])
        if found[3]:
            if capability == built:
                return True
        elif (built[0] == capability[0] and built <= capability) or (
            found[4] and built <= capability
        ):
            return True
    return False
