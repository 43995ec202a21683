"""bfloat16 convolutions of the shapes that torch itself gets wrong on some processors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compact_problems import Arguments
from problems import check, conv_problem, effective_weight

import lottery_sparse as ls
from lottery_sparse.ops import dispatch
from lottery_sparse.tools import doctor

BF16 = torch.bfloat16
BACKENDS = [b for b in dispatch.available("masked_conv2d", "cpu") if b != "cpu"]  # float32 alone

pytestmark = pytest.mark.numeric


def torch_is_right(p):
    """Whether F.conv2d on the effective weight gives y, dx and dw of float64, within rounding."""
    if doctor.wrong_convolutions():  # of what memory held before, so not always the same
        return False
    x, w = p.x.clone().requires_grad_(), effective_weight(p).to(BF16).requires_grad_()
    y = F.conv2d(x, w, p.bias, **p.options)
    dx, dw = torch.autograd.grad(y, (x, w), p.dy)
    try:
        check(p, [y.detach(), dx, dw * p.mask, p.dy.sum((0, 2, 3))])
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("form", ["masked", "compact"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", doctor.CONVOLUTIONS, ids=str)
def test_outputs_one_pixel_wide_at_a_stride(case, backend, form):
    (batch, channels, *image), (outputs, _, *kernel), options = case
    p = conv_problem((channels, outputs), kernel, image, batch, 0.6, dtype=BF16, **options)
    with ls.use_backend(backend):
        got = p.run() if form == "masked" else Arguments.of(p).run()
    if not torch_is_right(p):
        pytest.skip("torch's own bfloat16 convolution is wrong here: pytorch issue 169688")
    check(p, got)


def test_the_doctor_says_where_torch_is_wrong(monkeypatch):
    conv2d = F.conv2d

    def wrong(x, w, **options):
        y = conv2d(x, w, **options)
        return y * 1e22 if x.dtype == BF16 and x.shape[0] == 17 else y

    monkeypatch.setattr(doctor.F, "conv2d", wrong)
    (found,) = doctor.wrong_convolutions()
    assert found.startswith("x (17, 1, 25, 6), weight (7, 1, 5, 3), {'stride': (3, 2)")
    said = doctor.convolutions_line([found])
    assert "WRONG here" in said
    assert "1 of 3 tried, pytorch issue 169688" in said
    assert "right here" in doctor.convolutions_line([])
