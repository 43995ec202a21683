"""The four networks of the paper and the protocol of each, as data; how networks are built.

ReLU, no batch norm, no dropout; 3x3 convolutions with padding 1 and a 2x2 max-pool after each
pair; a linear output. Numbers: Zhou et al. 2019 with its scripts, and Frankle & Carbin 2019.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cache
from types import MappingProxyType

import torch
from torch import Tensor, nn

import lottery_sparse as ls
from experiments.study import parts

CLASSES = 10
EVALUATION_BATCH = 1_000  # images per forward pass; bounds the memory of the conv nets
SMALL_BATCH = 100  # the same in bfloat16: maps stay in the cache


@dataclass(frozen=True)
class Network:
    """A network, how the paper trains and prunes it, and how it is computed here (see `Run`).

    Attributes:
        build: gives a module with its initial weights, drawn by torch's global generator; None: a
            stack of `convolutions` and `hidden` layers.
        input_shape: channels, height, width; of such a stack.
        convolutions: output channels; a max-pool follows every second one.
        hidden: widths of the fully connected layers before the output.
        lr: of Adam, constant.
        iterations: of a round.
        keep: layer kind ("conv", "hidden", "output") -> share of kept weights that a round keeps.
        score_lr: of SGD with momentum 0.9 on the scores of a learned mask.
    """

    name: str
    dataset: str
    lr: float
    iterations: int
    keep: Mapping[str, Fraction] = field(hash=False)
    input_shape: tuple[int, int, int] = (1, 28, 28)
    convolutions: tuple[int, ...] = ()
    hidden: tuple[int, ...] = ()
    build: Callable[[], nn.Module] | None = None
    batch_size: int = 60
    score_lr: float = 100.0
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
        """Whether its modules compute it as they stand."""
        return (self.precision, self.layout, self.form) == ("float32", "contiguous", "compact")

    @property
    def goes_in_company(self) -> bool:
        """Whether it can be trained side by side with others."""
        return self.is_plain and self.build is None

    @property
    def has_convolutions(self) -> bool:
        return "conv" in kinds(self).values()


def _keep(**decimals: str) -> Mapping[str, Fraction]:
    return MappingProxyType({kind: Fraction(text) for kind, text in decimals.items()})


FC = Network(  # LeNet-300-100
    name="fc",
    dataset="mnist",
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
CONV4 = replace(
    CONV2, name="conv4", convolutions=(64, 64, 128, 128), lr=3e-4, iterations=25_500
)  # 34 epochs
CONV6 = replace(
    CONV4,
    name="conv6",
    convolutions=(64, 64, 128, 128, 256, 256),
    iterations=30_000,  # 40 epochs
    keep=_keep(conv="0.85", hidden="0.8", output="0.9"),
)

NETWORKS = {network.name: network for network in (FC, CONV2, CONV4, CONV6)}


def find(name: str) -> Network:
    """A network by name, or the one that "module:attr" names: a `Network`, or a function.

    A function gives a torch module, and has the protocol of `CONV4`.

    Raises:
        ValueError: there is none, or it is something else.
    """
    if not parts.is_path(name) and name not in NETWORKS:
        known = ", ".join(NETWORKS)
        raise ValueError(f"network must be one of {known}, or MODULE:ATTR; got {name!r}.")
    return _outside(name) if parts.is_path(name) else NETWORKS[name]


@cache
def _outside(path: str) -> Network:
    found = parts.attribute(path, "network")
    if isinstance(found, Network):
        network = replace(found, name=path)
    elif callable(found):
        network = replace(CONV4, name=path, convolutions=(), hidden=(), build=found)
    else:
        wanted = "a Network, or a function that gives a torch module"
        raise ValueError(f"network {path} must be {wanted}; got {parts.kind(found)}.")
    try:
        model = skeleton(network)
    except Exception as error:
        raise ValueError(f"network {path} cannot be built ({parts.said(error)}).") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"network {path} must give a torch module, got {parts.kind(model)}.")
    if not (there := set(kinds(network).values())):
        raise ValueError(f"network {path} has no nn.Linear or nn.Conv2d, which masks are of.")
    if silent := there - set(network.keep):
        raise ValueError(
            f"network {path} has {min(silent)} layers, but its keep says only what a round leaves "
            f"of {', '.join(network.keep)} layers."
        )
    return network


def check_fits(network: Network, images: Tensor, classes: int, dataset: str) -> None:
    """Raise ValueError unless the network gives logits [B, classes or more] for these images."""
    told = f"images {list(images.shape)} of {dataset}"
    try:
        with torch.no_grad():
            logits = build(network, 0).eval()(images)
    except Exception as error:
        raise ValueError(
            f"network {network.name} does not take {told} ({parts.said(error)})."
        ) from error
    shape = list(logits.shape) if isinstance(logits, Tensor) else None
    if shape is None or shape[:-1] != [len(images)] or shape[-1] < classes:
        raise ValueError(
            f"network {network.name} gives {parts.kind(logits)} for {told}, wanted logits "
            f"[{len(images)}, {classes}], or more of them."
        )


def build(network: Network, seed: int, device: torch.device | str = "cpu") -> nn.Module:
    """A module with the initial weights that belong to `seed`."""
    if network.build is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return skeleton(network).to(device)
    model = skeleton(network).to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = initial_value(name, parameter.shape, seed)
            parameter.copy_(columns_as_laid(network, name, value))
    return model


def holding(
    network: Network, weights: Mapping[str, Tensor], device: torch.device | str
) -> nn.Module:
    """The module with these parameters and buffers."""
    if network.build is not None:
        with torch.random.fork_rng(devices=[]):
            model = skeleton(network).to(device)
    else:
        model = skeleton(network).to_empty(device=device)
    for name, tensor in model.state_dict().items():
        tensor.copy_(weights[name])
    return model


def skeleton(network: Network) -> nn.Module:
    """The module for its names and shapes: of our networks without values, on the meta device."""
    if network.build is not None:
        model = network.build()
    else:
        with torch.device("meta"):  # constructors would draw from global state
            model = nn.Sequential(_layers(network))
    return model if network.is_plain else laid(model, network)


@cache
def kinds(network: Network) -> dict[str, str]:
    """Weight -> "conv", "hidden" or "output", the last linear layer: what can have a mask."""
    found = {
        f"{name}.weight": "conv" if isinstance(layer, nn.Conv2d) else "hidden"
        for name, layer in skeleton(network).named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear)
    }
    linear = [name for name, kind in found.items() if kind == "hidden"]
    return found | dict.fromkeys(linear[-1:], "output")


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
    """A weight of our networks in the contiguous layout, as the layout of the network has it.

    It computes the same: the columns of the first linear layer follow the maps.
    """
    if network.layout == "contiguous" or name != "fc1.weight":
        return weight
    return weight.unflatten(1, maps_of(network)).permute(0, 2, 3, 1).flatten(1)


class Laid(nn.Module):
    """Computes in the precision and layout of a network; images and logits are float32 as ever.

    Attributes:
        evaluation_batch: images of a forward pass that is not for training.
    """

    channels_last: bool
    lowers: bool

    @property
    def evaluation_batch(self) -> int:
        return SMALL_BATCH if self.lowers else EVALUATION_BATCH

    def forward(self, input: Tensor) -> Tensor:
        if self.channels_last:
            input = input.contiguous(memory_format=torch.channels_last)
        with torch.autocast(input.device.type, torch.bfloat16, enabled=self.lowers):
            logits = super().forward(input)
        return logits.float() if self.lowers else logits


def laid(model: nn.Module, network: Network) -> nn.Module:
    """The module, of a class that is `Laid` before it is what it was: names stay."""
    model.__class__ = type("Laid", (Laid, type(model)), {})
    vars(model)["channels_last"] = network.layout == "channels_last"
    vars(model)["lowers"] = network.precision == "bfloat16"
    return model


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


def keep_by_parameter(network: Network, rounds: int = 1) -> dict[str, Fraction]:
    """Parameter name -> the share of its kept weights that `rounds` rounds leave, for ls.prune.

    Biases are never pruned, so only weights are named.
    """
    return {name: network.keep[kind] ** rounds for name, kind in kinds(network).items()}
