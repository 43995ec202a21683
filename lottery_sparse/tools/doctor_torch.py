"""Whether torch's own bfloat16 convolutions are right on this processor.

oneDNN's kernel for AMX returns numbers far off where an output is one pixel wide and the stride is
more than one (https://github.com/pytorch/pytorch/issues/169688, open with torch 2.13). Layers that
take the dense library pass them on.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

# (shape of x, shape of the weight, options): outputs of one column, by strides of 2 and 3
CONVOLUTIONS: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ((17, 1, 25, 6), (7, 1, 5, 3), {"stride": (3, 2), "dilation": (1, 2)}),
    ((2, 3, 9, 5), (4, 3, 3, 3), {"stride": 3}),
    ((3, 16, 5, 5), (8, 16, 3, 3), {"stride": 3}),
]


def wrong_convolutions() -> list[str]:
    """Those of CONVOLUTIONS that F.conv2d gets wrong in bfloat16, by more than rounding."""
    generator, wrong = torch.Generator().manual_seed(0), []
    for x_shape, w_shape, options in CONVOLUTIONS:
        x, w = (torch.randn(s, generator=generator).bfloat16() for s in (x_shape, w_shape))
        expected = F.conv2d(x.double(), w.double(), **options)
        size = F.conv2d(x.double().abs(), w.double().abs(), **options)
        error = (F.conv2d(x, w, **options).double() - expected).abs()
        if not (error <= 2 * torch.finfo(x.dtype).eps * size).all():  # NaN is wrong, too
            wrong.append(f"x {x_shape}, weight {w_shape}, {options}")
    return wrong


def line(wrong: list[str]) -> str:
    """One sentence on what `wrong_convolutions` found."""
    if not wrong:
        return "its own bfloat16 convolutions are right here"
    return (
        f"its own bfloat16 convolutions are WRONG here for some strides, and so are layers that "
        f"take them ({len(wrong)} of {len(CONVOLUTIONS)} tried, pytorch issue 169688); use "
        "float32, or torch.backends.mkldnn.flags(enabled=False)"
    )
