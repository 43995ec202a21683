"""SupermaskLinear and SupermaskConv2d: frozen weights under a mask that is learned.

Each weight has a score, and is used with the probability sigmoid(score). Only the scores train.
Every training step draws a new mask.
"""

from __future__ import annotations

import inspect
from typing import Any, SupportsFloat

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling, is_exporting
from torch.fx import Proxy

from lottery_sparse import ops
from lottery_sparse.nn.common import one_node, outside_inference_mode, redraw_
from lottery_sparse.nn.frozen import std_of
from lottery_sparse.nn.loading import CheckedLoad, LayerLoad
from lottery_sparse.nn.recompute import advance, key_and_next, next_key
from lottery_sparse.ops.bits.reference import mask_as_bool
from lottery_sparse.ops.common.eager import eager
from lottery_sparse.ops.dispatch import overrides
from lottery_sparse.ops.random.op import key as random_key
from lottery_sparse.pruning.masks import as_mask
from lottery_sparse.text import shown

WEIGHTS = ("init", "signed_constant")
EVALUATIONS = ("sample", "threshold")  # in this order: a state_dict holds the place
# Evaluations draw at steps from here on, so that they share no random word with the training.
FIRST_SAMPLE = 2**31
_FIRST_STEPS = {"key": 0, "sample_key": FIRST_SAMPLE}


class Supermask(CheckedLoad):
    """The base of layers with a learned mask: scores, frozen weights, and how masks are drawn.

    Parameters:

        score   like the weight: the only one that trains; sigmoid(score) = probability of use
        weight  frozen: requires_grad is False; so is `bias`

    Buffers, all in the state_dict, so that a resumed training draws what it would have drawn:

        key         int64 [3] (or [E, 3]): seed, stream, and the step that is drawn next
        sample_key  the same of evaluations, which leave the training's draws alone
        held_mask   None, or bool like the weight: what evaluations use instead of `evaluation`

    The state_dict also holds `evaluates_with` (uint8: the place of `evaluation` in EVALUATIONS).
    Loading it sets `evaluation`. Older checkpoints lack this entry; they still load, and the layer
    keeps its setting.

    Attributes:

        rescale     weights are divided by the share of them that the mask keeps
        round_mask  a training step uses sigmoid(score) itself for a random half of the weights, and
                    0 or 1, whichever is nearer, for the others; evaluations threshold
        evaluation  what a layer in evaluation mode uses: "sample", a fresh mask per call; or
                    "threshold", weights more probable than not (a probability of 1/2 is not used)

    Under torch.utils.checkpoint the recomputed forward uses the masks that the first forward drew.
    Other ways to run a forward again in the backward raise, since its masks are not known there.
    """

    dense_type: type[nn.Module]
    rank: int  # dimensions of one weight; E networks side by side have one more
    score: nn.Parameter
    weight: nn.Parameter
    bias: nn.Parameter | None
    key: Tensor
    sample_key: Tensor
    held_mask: Tensor | None
    weights: str
    rescale: bool
    round_mask: bool
    evaluation: str
    init_score: float

    def __init__(self, *args: Any, **kwargs: Any):
        options = {name: kwargs.pop(name, default) for name, default in _OPTIONS.items()}
        check_options(options["weights"], options["init_score"], options["evaluation"])
        super().__init__(*args, **kwargs)
        self._enter_supermask(**options)

    def _enter_supermask(
        self,
        weights: str,
        rescale: bool,
        init_score: float,
        round_mask: bool,
        evaluation: str,
        seed: int,
        stream: int,
    ) -> None:
        """Freeze weight and bias, and add the scores."""
        self.weights, self.rescale, self.init_score = weights, bool(rescale), float(init_score)
        self.round_mask, self.evaluation = bool(round_mask), evaluation
        if weights == "signed_constant":
            self._sign_weights()
        for parameter in self._parameters.values():
            if parameter is not None:
                parameter.requires_grad_(False)
                parameter.grad = None
        score = torch.full_like(self.weight, self.init_score, requires_grad=False)
        self.score = nn.Parameter(outside_inference_mode(score.detach()))
        self._seed, self._stream = seed, stream
        for name, step in _FIRST_STEPS.items():
            self.register_buffer(
                name, outside_inference_mode(random_key(seed, stream, step, self.weight.device))
            )
        self.register_buffer("held_mask", None, persistent=False)  # saved and loaded by hand below

    @torch.no_grad()
    def _leave_supermask(self) -> None:
        """From supermask to dense: weight and bias stay, and train again."""
        for name in (*_FIRST_STEPS, "held_mask"):
            del self._buffers[name]
        self._non_persistent_buffers_set.discard("held_mask")
        del self._parameters["score"]
        for name in (
            "weights", "rescale", "round_mask", "evaluation", "init_score", "_seed", "_stream",
        ):  # fmt: skip
            del self.__dict__[name]
        for parameter in self._parameters.values():
            if parameter is not None:
                parameter.requires_grad_(True)

    @torch.no_grad()
    def _restart(self) -> None:
        """Reset scores and draws to the start."""
        self.score.fill_(self.init_score)
        for name, step in _FIRST_STEPS.items():
            self._buffers[name][..., 2] = step  # pyright: ignore[reportOptionalSubscript]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        was_meta = self.key.is_meta
        super()._apply(fn, recurse)
        if was_meta and not self.key.is_meta:  # to_empty left arbitrary memory
            for name in _FIRST_STEPS:
                self._buffers[name].copy_(random_key(self._seed, self._stream))  # pyright: ignore
            self._restart()
            self.evaluate_with(None)
        return self

    @torch.no_grad()
    def _sign_weights(self) -> None:
        """sign x constant, the population standard deviation of a layer's weights."""
        if self.weight.is_meta:
            return
        networks = self.weight.unbind() if self.weight.dim() > self.rank else (self.weight,)
        for w in networks:
            w.copy_(w.sign() * std_of(w))

    def reset_parameters(self) -> None:
        """New weights as the dense layer draws them, bias 0, scores and draws from the start."""
        redraw_(self.weight, self.bias, self.dense_type, self.rank)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if "score" not in self._parameters:  # called by the constructor of the dense layer
            return
        if self.weights == "signed_constant":
            self._sign_weights()
        self._restart()

    def reseed(self, seed: int) -> None:
        """Draw with another seed, from the first step on."""
        self._seed = seed
        for name, step in _FIRST_STEPS.items():
            self._buffers[name].copy_(random_key(seed, self._stream, step))  # pyright: ignore

    @property
    def probability(self) -> Tensor:
        """sigmoid(score): how probable the use of each weight is."""
        return torch.sigmoid(self.score)

    @property
    def expected_density(self) -> float:
        """Mean probability."""
        return float(self.score.detach().double().sigmoid().mean()) if self.score.numel() else 1.0

    @property
    def weight_mask(self) -> Tensor:
        """bool: the mask chosen for evaluations, else the weights more probable than not."""
        if self.held_mask is not None:
            return self.held_mask
        return self.score.detach() > 0  # sigmoid > 1/2; a half rounds to even, which is 0

    def sample(self, number: int) -> Tensor:
        """The mask of evaluation `number`, bool: a function of the scores, seed and stream."""
        key = self.sample_key.clone()
        key[..., 2] = FIRST_SAMPLE + number
        bits, _ = ops.sample_bits(self._flat(self.score.detach()), key)
        return mask_as_bool(bits, self.score, self.rank)

    def evaluate_with(self, mask: Tensor | None) -> None:
        """Evaluate with this mask from now on; None: as `evaluation` says."""
        self.held_mask = (
            None if mask is None else outside_inference_mode(mask.to(self.score.device).clone())
        )

    def _flat(self, score: Tensor) -> Tensor:
        return score.flatten(1 - self.rank) if self.rank > 2 else score

    def _next(self, name: str, compiles: bool) -> Tensor:
        """The key of the next draw; the counter moves on."""
        buffer = self._buffers[name]
        assert buffer is not None
        if not compiles:
            return next_key(buffer)
        if is_exporting():
            return advance(buffer)
        key, self._buffers[name] = key_and_next(buffer)
        return key

    def _key_or_mask(self, compiles: bool) -> tuple[Tensor | None, Tensor | None]:
        """What the mask of this call is drawn from; or it itself, of an evaluation that has one."""
        if self.training:
            return self._next("key", compiles), None
        held = self._buffers["held_mask"]
        if held is None and self.evaluation == "sample" and not self.round_mask:
            return self._next("sample_key", compiles), None
        return None, self.score.detach() > 0 if held is None else held  # `weight_mask`

    def _half_rounded(self, key: Tensor) -> Tensor:
        """w m r with m as `round_mask` says; r, which is not detached, is 1 without `rescale`."""
        coin = ops.sample_mask(torch.zeros_like(self.score).detach(), key)  # each side: a half
        p = self.probability
        m = torch.where(coin != 0, (self.score > 0).to(p.dtype), p)
        w = self.weight * m.to(self.weight.dtype)
        if not self.rescale:
            return w
        own = tuple(range(-self.rank, 0))
        size = self.score.shape[-self.rank :].numel()
        return w * (size / m.sum(own, keepdim=True).clamp(min=1)).to(w.dtype)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        number = EVALUATIONS.index(self.evaluation)
        destination[prefix + "evaluates_with"] = torch.tensor(number, dtype=torch.uint8)
        if self.held_mask is not None:
            destination[prefix + "held_mask"] = self.held_mask

    def _entries(self, load: LayerLoad) -> Any:
        """What evaluations use, and the mask that they are told to use."""
        names = load.names("evaluates_with", "held_mask")
        number, mask = (load.state.get(name) for name in names)
        if number is None and mask is None:
            return None
        evaluation = self.evaluation if number is None else _evaluation(names[0], number)
        if mask is not None:
            mask = as_mask(names[1], mask)
            if mask.shape != self.score.shape:
                raise ValueError(
                    f"{names[1]} has shape {tuple(mask.shape)}, the model needs "
                    f"{tuple(self.score.shape)}."
                )
        load.own.update(names)
        return evaluation, mask

    def _take(self, load: LayerLoad, entries: Any) -> None:
        self.evaluation, mask = entries
        self.evaluate_with(mask)

    def extra_repr(self) -> str:
        density = "?" if self.score.is_meta else f"{self.expected_density:.4g}"
        options = [f"weights={self.weights}", f"expected_density={density}"]
        options += [name for name in ("rescale", "round_mask") if getattr(self, name)]
        return ", ".join([super().extra_repr(), *options])


def check_options(weights: str, init_score: float, evaluation: str) -> None:
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}; got {weights!r}.")
    if evaluation not in EVALUATIONS:
        raise ValueError(f"evaluation must be one of {', '.join(EVALUATIONS)}; got {evaluation!r}.")
    if not isinstance(init_score, SupportsFloat):
        raise TypeError(f"init_score must be a number, got {type(init_score).__name__}.")
    if not -float("inf") < init_score < float("inf"):
        raise ValueError(f"init_score must be a finite number, got {init_score}.")


def _evaluation(name: str, number: Tensor) -> str:
    """The evaluation that the entry `evaluates_with` of a state_dict names."""
    if number.numel() != 1 or not 0 <= int(number) < len(EVALUATIONS):
        raise ValueError(
            f"{name} is {shown(repr(number.tolist()))}, but this version knows 0 to "
            f"{len(EVALUATIONS) - 1}; the checkpoint is of a newer version, or damaged."
        )
    return EVALUATIONS[int(number)]


def _every(weight: Tensor) -> Tensor:
    return torch.ones_like(weight, dtype=torch.bool, requires_grad=False)


_OPTIONS: dict[str, Any] = {
    "weights": "init",
    "rescale": False,
    "init_score": 0.0,
    "round_mask": False,
    "evaluation": "sample",
    "seed": 0,
    "stream": 0,
}


def _signature(dense: type[nn.Module]) -> inspect.Signature:
    """The signature of the dense layer, and our options by name."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    ours = [inspect.Parameter(n, keyword, default=v) for n, v in _OPTIONS.items()]
    return inspect.Signature([*inspect.signature(dense).parameters.values(), *ours])


_TENSORS = {"score", "weight", "bias"}


class SupermaskLinear(Supermask, nn.Linear):
    """nn.Linear whose weights are frozen and whose mask is learned: y = x (w m r)ᵀ + b.

    Constructor, shapes and attributes are nn.Linear's, with the options of `Supermask` by name; the
    bias is frozen too, at 0. `ls.supermask_` turns the layers of a model into these.

    >>> layer = ls.nn.SupermaskLinear(20, 10, weights="signed_constant", rescale=True)
    >>> layer(x).shape, layer.expected_density
    (torch.Size([8, 10]), 0.5)

    Args:
        weights: "init": the initial ones; "signed_constant": their signs times their population
            standard deviation.
        rescale, round_mask, evaluation: see `Supermask`. The gradient flows through the rescaling.
        init_score: every score at the start.
        seed, stream: masks are drawn by `ls.random`; layers of a model need different streams.

    Source: Zhou et al. 2019, section 4 (learned masks, dynamic weight rescaling).
    """

    dense_type, rank = nn.Linear, 2
    __signature__ = _signature(nn.Linear)

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return one_node(self, input)
        compiles = is_dynamo_compiling()
        if self.training and self.round_mask:
            w = self._half_rounded(self._next("key", compiles))
            return ops.masked_linear(input, w, _every(w), self.bias)
        key, mask = self._key_or_mask(compiles)
        own: Any = self._parameters
        if compiles or not own.keys() >= _TENSORS:  # a replica has none
            score, weight, bias = self.score, self.weight, self.bias
        else:  # which is quicker
            score, weight, bias = own["score"], own["weight"], own["bias"]
        node = None if compiles or overrides else eager()
        if node is not None:
            y = node.supermask_linear(input, score, weight, bias, key, mask, self.rescale)
            if y is not None:  # nobody watches ops, and the tensors fit
                return y
        return ops.supermask_linear(
            input, score, weight, key, bias, mask=mask, rescale=self.rescale
        )


class SupermaskConv2d(Supermask, nn.Conv2d):
    """nn.Conv2d whose weights are frozen and whose mask is learned. See `SupermaskLinear`.

    >>> layer = ls.nn.SupermaskConv2d(3, 16, 3, padding=1)
    >>> layer(images).shape
    torch.Size([4, 16, 8, 8])
    """

    dense_type, rank = nn.Conv2d, 4
    __signature__ = _signature(nn.Conv2d)

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return one_node(self, input)
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        geometry = self.stride, padding, self.dilation, self.groups
        compiles = is_dynamo_compiling()
        if self.training and self.round_mask:
            w = self._half_rounded(self._next("key", compiles))
            return ops.masked_conv2d(input, w, _every(w), self.bias, None, *geometry)
        key, mask = self._key_or_mask(compiles)
        return ops.supermask_conv2d(
            input, self.score, self.weight, key, self.bias, *geometry,
            mask=mask, rescale=self.rescale,
        )  # fmt: skip
