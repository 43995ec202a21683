"""The module _eager (csrc/linear/eager.cpp): forward and backward of layers as C++ autograd nodes.

It is built for one version of torch, whose C++ interface it uses, and everything works without it.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

import torch


def node_module() -> str:
    """The module's name, which has the version of torch that it is built for."""
    version = "".join(c if c.isalnum() else "_" for c in torch.__version__.split("+")[0])
    return f"lottery_sparse._eager_{version}"


@cache
def eager() -> ModuleType | None:
    """The module, if it was built for this very torch, with the kernels that its nodes call."""
    try:
        importlib.import_module("lottery_sparse._C")  # the kernels
        return importlib.import_module(node_module())
    except ImportError:
        return None


def has_node() -> bool:
    """Whether the C++ autograd nodes are here; that of compact layers follows their `products`."""
    return eager() is not None
