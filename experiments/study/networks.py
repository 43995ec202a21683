"""The four networks of the paper and the protocol of each, as data; how they are built.

ReLU, no batch norm, no dropout; 3x3 convolutions with padding 1 and a 2x2 max-pool after each
pair; a linear output. Numbers: Zhou et al. 2019 with its scripts, and Frankle & Carbin 2019.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from types import MappingProxyType

import torch
from torch import Tensor, nn

import lottery_sparse as ls

CLASSES = 10
EVALUATION_BATCH = 1_000  # images per forward pass; bounds the memory of the conv nets
SMALL_BATCH = 100  # the same in bfloat16: maps stay in the cache


@dataclass(frozen=True)
class Network:
    """A network, how the paper trains and prunes it, and how it is computed here (see `Run`)."""

    name: str
    dataset: str
    input_shape: tuple[int, int, int]  # channels, height, width
    convolutions: tuple[int, ...]  # output channels; a max-pool follows every second one
    hidden: tuple[int, ...]  # widths of the fully connected layers before the output
    lr: float  # of Adam, constant
    iterations: int  # per round
    # layer kind -> share of the kept weights that a round keeps
    keep: Mapping[str, Fraction] = field(hash=False)
    batch_size: int = 60
    score_lr: float = 100.0  # of SGD with momentum 0.9 on the scores of a learned mask
    score_iterations: int = 360_000  # 2,000 epochs of 180
    score_batch_size: int = 250
    precision: str = "float32"
    layout: str = "contiguous"
    form: str = "compact"

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {self.iterations}.")
        for kind, share in self.keep.items():
            if not 0 <= share <= 1:
                raise ValueError(f"keep is a fraction in [0, 1], got {share} for {kind} layers.")

    @property
    def is_plain(self) -> bool:
        """Whether its modules compute it as they stand, and side by side with others."""
        return (self.precision, self.layout, self.form) == ("float32", "contiguous", "compact")


def _keep(**decimals: str) -> Mapping[str, Fraction]:
    return MappingProxyType({kind: Fraction(text) for kind, text in decimals.items()})


FC = Network(  # LeNet-300-100
    name="fc",
    dataset="mnist",
    input_shape=(1, 28, 28),
    convolutions=(),
    hidden=(300, 100),
    lr=1.2e-3,
    iterations=50_380,  # 55 epochs of 916
    score_iterations=440_000,  # 2,000 epochs of 220
    keep=_keep(hidden="0.8", output="0.9"),
)
CONV2 = Network(
    name="conv2",
    dataset="cifar10",
    input_shape=(3, 32, 32),
    convolutions=(64, 64),
    hidden=(256, 256),
    lr=2e-4,
    iterations=20_250,  # 27 epochs of 750
    keep=_keep(conv="0.9", hidden="0.8", output="0.9"),
)
CONV4 = Network(
    name="conv4",
    dataset="cifar10",
    input_shape=(3, 32, 32),
    convolutions=(64, 64, 128, 128),
    hidden=(256, 256),
    lr=3e-4,
    iterations=25_500,  # 34 epochs
    keep=_keep(conv="0.9", hidden="0.8", output="0.9"),
)
CONV6 = Network(
    name="conv6",
    dataset="cifar10",
    input_shape=(3, 32, 32),
    convolutions=(64, 64, 128, 128, 256, 256),
    hidden=(256, 256),
    lr=3e-4,
    iterations=30_000,  # 40 epochs
    keep=_keep(conv="0.85", hidden="0.8", output="0.9"),
)

NETWORKS = {network.name: network for network in (FC, CONV2, CONV4, CONV6)}


def find(name: str) -> Network:
    """A network by name.

    Raises:
        ValueError: there is none.
    """
    if name not in NETWORKS:
        raise ValueError(f"network must be one of {', '.join(NETWORKS)}; got {name!r}.")
    return NETWORKS[name]


def build(network: Network, seed: int, device: torch.device | str = "cpu") -> nn.Sequential:
    """A plain nn module with the initial weights that belong to `seed`."""
    model = skeleton(network).to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = initial_value(name, parameter.shape, seed)
            parameter.copy_(columns_as_laid(network, name, value))
    return model


def skeleton(network: Network) -> nn.Sequential:
    """The module without values: names and shapes on the meta device."""
    with torch.device("meta"):  # the constructors' own initialisation would draw from global state
        layers = _layers(network)
        return nn.Sequential(layers) if network.is_plain else Laid(layers, network)


def _layers(network: Network) -> OrderedDict[str, nn.Module]:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = network.input_shape[0]
    last = network.layout == "channels_last"
    for i, out_channels in enumerate(network.convolutions, start=1):
        layers[f"conv{i}"] = nn.Conv2d(channels, out_channels, 3, padding=1)
        relu, channels = nn.ReLU(), out_channels
        if i % 2:
            layers[f"conv{i}_relu"] = relu
        elif last:  # the same numbers, of a quarter of the activations
            layers |= {f"pool{i // 2}": nn.MaxPool2d(2), f"conv{i}_relu": relu}
        else:
            layers |= {f"conv{i}_relu": relu, f"pool{i // 2}": nn.MaxPool2d(2)}
    layers["flatten"] = FlattenLast() if last else nn.Flatten()
    features = math.prod(maps_of(network))
    for i, out_features in enumerate(network.hidden, start=1):
        layers[f"fc{i}"] = nn.Linear(features, out_features)
        layers[f"fc{i}_relu"] = nn.ReLU()
        features = out_features
    layers["output"] = nn.Linear(features, CLASSES)
    return layers


def maps_of(network: Network) -> tuple[int, int, int]:
    """Channels, height and width of what the first linear layer reads."""
    channels, height, width = network.input_shape
    shrunk = 2 ** (len(network.convolutions) // 2)
    return (*network.convolutions[-1:], channels)[0], height // shrunk, width // shrunk


class FlattenLast(nn.Module):
    """[B, C, H, W] -> [B, H · W · C]: of maps that lie channels last, a view."""

    def forward(self, maps: Tensor) -> Tensor:
        return maps.permute(0, 2, 3, 1).flatten(1)


def columns_as_laid(network: Network, name: str, weight: Tensor) -> Tensor:
    """A weight of the network in the contiguous layout, as the layout of the network has it.

    It computes the same: the columns of the first linear layer follow the maps.
    """
    if network.layout == "contiguous" or name != "fc1.weight":
        return weight
    return weight.unflatten(1, maps_of(network)).permute(0, 2, 3, 1).flatten(1)


class Laid(nn.Sequential):
    """Layers in the precision and layout of a network; images and logits are float32 as ever.

    Attributes:
        evaluation_batch: images of a forward pass that is not for training.
    """

    def __init__(self, layers: OrderedDict[str, nn.Module], network: Network):
        super().__init__(layers)
        self.channels_last = network.layout == "channels_last"
        self.lowers = network.precision == "bfloat16"
        self.evaluation_batch = SMALL_BATCH if self.lowers else EVALUATION_BATCH

    def forward(self, input: Tensor) -> Tensor:
        if self.channels_last:
            input = input.contiguous(memory_format=torch.channels_last)
        with torch.autocast(input.device.type, torch.bfloat16, enabled=self.lowers):
            logits = super().forward(input)
        return logits.float() if self.lowers else logits


def initial_value(name: str, shape: torch.Size, seed: int) -> Tensor:
    """The value a parameter starts from: a function of (seed, parameter name) alone.

    Weights: Glorot normal as TensorFlow 1.10 drew it, truncated at two standard deviations and
    widened so that the standard deviation is sqrt(2 / (fan_in + fan_out)) all the same. Biases: 0.
    """
    if len(shape) < 2:
        return torch.zeros(shape)
    stream = ls.random.stream_of(name)
    return ls.random.truncated_normal(shape, glorot_std(shape), seed=seed, stream=stream)


def glorot_std(shape: torch.Size) -> float:
    """sqrt(2 / (fan_in + fan_out)) of a weight [out, in, *kernel]."""
    kernel = math.prod(shape[2:])
    return math.sqrt(2 / (kernel * (shape[0] + shape[1])))


def layer_kind(name: str) -> str:
    """conv, hidden or output: the kinds that a network's `keep` speaks of."""
    if name.startswith("conv"):
        return "conv"
    return "output" if name.startswith("output") else "hidden"


def keep_by_parameter(network: Network, rounds: int = 1) -> dict[str, Fraction]:
    """Parameter name -> the share of its kept weights that `rounds` rounds leave, for ls.prune.

    Biases are never pruned, so only weights are named.
    """
    return {
        name: network.keep[layer_kind(name)] ** rounds
        for name, parameter in skeleton(network).named_parameters()
        if parameter.dim() >= 2
    }
