"""What compact layers and their neighbours say about arguments that do not fit."""

from __future__ import annotations

import re

import pytest
import torch
from test_compact_layers import pair
from torch import nn

import lottery_sparse as ls


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bfloat16])
@pytest.mark.parametrize("density", [0.2, 0.9])
def test_an_input_of_another_dtype(dtype, density):
    sentence = f"weight is torch.float32, but x is {dtype}; convert one, or use torch.autocast."
    for layer in pair(nn.Linear(12, 9), density=density):
        with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
            layer(torch.ones(3, 12, dtype=dtype))


@pytest.mark.parametrize("density", [0.2, 0.9])
def test_an_image_that_is_smaller_than_the_kernel(density):
    _, layer = pair(nn.Conv2d(2, 3, 3, padding=(0, 1), dilation=(1, 2)), density=density)
    assert layer(torch.randn(1, 2, 3, 3)).shape == (1, 3, 1, 1)
    for height, width in ((2, 3), (3, 2)):
        with pytest.raises(ValueError, match=r"^x has shape .* whose images are smaller than the"):
            layer(torch.randn(1, 2, height, width))


def test_types_that_functions_of_models_refuse():
    with pytest.raises(TypeError, match=r"^init_score must be a number, got str\.$"):
        ls.supermask_(nn.Linear(3, 2), init_score="a")
    plain, _ = pair(nn.Linear(12, 9))
    with pytest.raises(TypeError, match=r"^inputs bring a list to .*; give what"):
        ls.plan(plain, [torch.randn(3, 12)])
