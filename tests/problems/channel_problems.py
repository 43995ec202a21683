"""Models for the tests of drop_channels, and steps of training that show every gradient."""

from __future__ import annotations

import warnings

import tolerances
import torch
import torch.nn.functional as F
from torch import nn

import lottery_sparse as ls

SMALLEST_STD = 0.003  # which batch norms divide by; two lie behind each other
# A bias before a batch norm has a gradient that is 0 but for rounding; Adam's usual 1e-8 would make
# steps of that.
EPS = 1e-3


def small_conv(width=16, bias=True, image=(3, 12, 12)):
    """As the Conv-4 of the paper, small, with strides and paddings."""
    features = 2 * width * (image[1] // 4) * (image[2] // 4)
    return nn.Sequential(
        nn.Conv2d(image[0], width, 3, padding=1, bias=bias),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, bias=bias),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=bias),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(features, 32, bias=bias),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


def strided():
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, stride=2),
        nn.LeakyReLU(),
        nn.AvgPool2d(2, stride=1, padding=1),
        nn.Sequential(
            nn.Conv2d(12, 12, 3, padding="same", padding_mode="reflect", dilation=2),
            nn.Sequential(nn.ReLU6(), nn.Conv2d(12, 12, 1, bias=False), nn.GELU()),
        ),
        nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()),
        nn.Linear(48, 24, bias=False),
        nn.Tanh(),
        nn.Linear(24, 16),
        nn.Sigmoid(),
        nn.Linear(16, 4),
    )


def normed(bias=False):
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=bias),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        nn.Conv2d(16, 16, 3, bias=bias),
        nn.BatchNorm2d(16, affine=False),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.BatchNorm1d(16 * 25),
        nn.Linear(16 * 25, 24, bias=bias),
        nn.BatchNorm1d(24),
        nn.ReLU(),
        nn.Linear(24, 10),
    )


def linear_only():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(432, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 5)
    )


MODELS = {
    "conv": small_conv,
    "conv without biases": lambda: small_conv(bias=False),
    "strided": strided,
    "batch norm": normed,
    "batch norm, biases": lambda: normed(bias=True),
    "linear": linear_only,
}


def masked(name: str, density: float, biases: str = "mixed", seed: int = 0) -> nn.Module:
    """float64, with random masks, and the last layer at 10 times the density."""
    torch.manual_seed(seed)
    model = ls.sparsify_(MODELS[name]().double())
    masks = {n: torch.rand(m.shape) < density for n, m in ls.masks_of(model).items()}
    last = list(masks)[-1]
    masks[last] = torch.rand(masks[last].shape) < min(1.0, 10 * density)
    with torch.no_grad():
        for module in model.modules():
            bias = getattr(module, "bias", None)
            if isinstance(bias, nn.Parameter):
                values = {"mixed": torch.randn_like(bias), "zero": torch.zeros_like(bias)}
                bias.copy_(values[biases])
                if name != "batch norm, biases":  # see CASES of test_channels.py
                    bias.mul_(torch.rand(bias.shape) < 0.7)
    return set_masks_(model, masks)


def set_masks_(model: nn.Module, masks: dict) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a layer that keeps nothing
        return ls.set_masks_(model, masks)


def batch(count=4):
    return torch.randn(count, 3, 12, 12, dtype=torch.float64)


def close(got, expected, note=""):
    largest = max([1.0, *expected.detach().double().abs().flatten().tolist()]) / SMALLEST_STD**2
    tolerances.close(got, expected, size=largest, msg=lambda text: f"{note} {text}")


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "nesterov": lambda p: torch.optim.SGD(
        p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01
    ),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, eps=EPS),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, eps=EPS, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, eps=EPS, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, eps=1e-2),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, eps=1e-2),
    "ls.optim": lambda p: ls.optim.Adam(p, lr=1e-2, eps=EPS),
}


def train(model, optimizer, like, clip=None, steps=3):
    """Output and gradients, by name, of each step, on batches like `like`."""
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    torch.manual_seed(7)
    history = []
    for _ in range(steps):
        y = model(torch.randn_like(like)).flatten(1)
        loss = F.cross_entropy(y, torch.randint(y.shape[1], (len(y),)))
        optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        optimizer.step()
        history.append((y.detach(), gradients))
    return history


def check_history(narrow, whole, channels):
    """Equal outputs and gradients at each step, and zero gradients of what was dropped."""
    for (y, small), (y_whole, large) in zip(narrow, whole, strict=True):
        close(y, y_whole)
        assert small.keys() == large.keys()
        for key, gradient in large.items():
            name = key.rpartition(".")[0]
            at = channels.outputs[name]
            at = (at[:, None], channels.inputs[name]) if gradient.dim() > 1 else at
            close(small[key], gradient[at], key)
            gradient[at] = 0
            assert not gradient.any(), f"{key}: a dropped weight has a gradient"
