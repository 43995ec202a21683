"""Somebody else's network, data set and criterion: the example of experiments/README.md."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.study.networks import Network


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.stride, self.more = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        shortcut = x[:, :, :: self.stride, :: self.stride]  # without weights, as in He et al. 2015
        return F.relu(y + F.pad(shortcut, (0, 0, 0, 0, 0, self.more)))


class ResNet(nn.Sequential):
    """ResNet-20 of He et al. 2015 for `channels` 3 and `width` 16; 6 · `blocks` + 2 layers."""

    def __init__(self, channels: int = 3, width: int = 16, blocks: int = 3):
        layers: list[nn.Module] = [
            nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        ]  # fmt: skip
        inputs = width
        for stage in range(3):
            for block in range(blocks):
                outputs = width * 2**stage
                layers.append(Block(inputs, outputs, stride=2 if stage and not block else 1))
                inputs = outputs
        head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10)
        super().__init__(*layers, *head)


SHARES = {"conv": Fraction("0.8"), "hidden": Fraction("0.8"), "output": Fraction("0.9")}
resnet20 = Network(
    name="resnet20", dataset="cifar10", build=ResNet, lr=1e-3, iterations=30_000, keep=SHARES
)
resnet = Network(  # the same, small; a thousandth of the iterations in profile smoke
    name="resnet",
    dataset="mnist",
    build=lambda: ResNet(channels=1, width=2),
    lr=1e-2,
    iterations=30_000,
    keep=SHARES,
)


def spread(w_init: Tensor, w_final: Tensor, generator: object) -> Tensor:
    """A criterion: the weights that lie furthest from the mean of their layer."""
    return (w_final - w_final.mean()).abs()


def stripes() -> list[tuple[Tensor, Tensor]]:
    """A data set: four kinds of stripes, of 8x8, as bytes; to train, validate and test."""
    found = []
    for seed, count in ((0, 240), (1, 40), (2, 40)):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(count) % 4
        places = torch.arange(8)
        rows = (places // (1 + labels % 2)[:, None]) % 2  # wide or narrow
        images = torch.where((labels < 2)[:, None, None], rows[:, None, :], rows[:, :, None])
        images = images.expand(count, 8, 8) * 200
        noise = torch.randint(0, 55, images.shape, generator=generator)
        found.append(((images + noise).byte()[:, None], labels))
    return found
