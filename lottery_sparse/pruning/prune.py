"""prune: from scores to the next masks, with exact counts, layer by layer or globally."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from lottery_sparse import ops
from lottery_sparse.ops.random.op import Stream, as_seed, stream_of
from lottery_sparse.pruning.criteria import CRITERIA, Criterion
from lottery_sparse.pruning.masks import Masks
from lottery_sparse.pruning.names import keys_of, matched
from lottery_sparse.text import shown

Keep = float | str | Decimal | Fraction


def keep_count(kept: int, keep: Keep) -> int:
    """round-half-up(keep · kept), exact on the decimal fraction as it is written.

    0.8 means 4/5, not the nearest binary number: 235,200 weights at 0.8 keep 188,160.

    Raises:
        ValueError: keep is not a number in [0, 1].
    """
    try:
        fraction = keep if isinstance(keep, Fraction) else Fraction(str(keep))
    except (ValueError, ZeroDivisionError):
        fraction = None
    if fraction is None or not 0 <= fraction <= 1:
        raise ValueError(
            f"keep is a fraction of the weights kept so far, in [0, 1], got {keep!r}; "
            "0.8 prunes a fifth."
        )
    return int(fraction * kept + Fraction(1, 2))


def prune(
    w_init: Mapping[str, Tensor],
    w_final: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    criterion: str | Criterion,
    keep: Keep | Mapping[str, Keep],
    scope: str = "layer",
    generator: int | torch.Generator | None = None,
) -> Masks:
    """The next masks: of the weights kept so far, the `keep` fraction that scores highest.

    >>> train(model)
    >>> ls.prune(w_init, model.state_dict(), masks, "large_final", keep=0.5).kept  # of 44
    22

    Args:
        w_init, w_final: parameter name -> weights at the start and the end of the training;
            further names are ignored, so a state_dict will do, also that of the model wrapped
            otherwise (torch.compile, DistributedDataParallel, FSDP).
        masks: name -> mask so far, bool, True = kept. A pruned weight never returns. The result
            has these names; draws are keyed by them without wrappers' components (`module`,
            `_orig_mod`, ...), so that one seed gives one mask for the plain and the wrapped model.
        criterion: a name in `CRITERIA`, or a function (w_init, w_final, generator) -> scores. It
            is called with the vectors of kept weights of one layer.
        keep: fraction of the weights kept so far, in [0, 1], or a dict of them by name (names
            left out keep all). Not a percentage.
        scope: "layer" ranks each layer by itself, as the paper does; "global" ranks all weights
            together and takes one fraction.
        generator: int seed, or a CPU Generator from which one seed is drawn; None = 0. Seeds the
            ties and the criterion "random"; use another one in each round.

    Returns:
        Masks with exactly round-half-up(keep · kept) kept weights per layer (or in all).

    Raises:
        ValueError: unknown criterion, scope or name, shapes that differ, keep outside [0, 1], or
            NaN scores; the message names the layer. Or masks has no entry.
        TypeError: a model in place of its state_dict or masks.
    """
    score = find(criterion, CRITERIA, "criterion")
    _check_kinds(w_init, w_final, masks)
    masks, seed = Masks(masks), as_seed(generator)
    keeps = check_keep(keep, scope, masks)
    w_init, w_final = (_named(n, w, masks) for n, w in (("w_init", w_init), ("w_final", w_final)))
    keys = keys_of(masks)
    scores = {
        name: _scores(name, score, w_init[name], w_final[name], mask, Stream(seed, stream))
        for name, mask in masks.items()
        for stream in [f"criterion/{keys[name]}"]
    }
    if scope == "global" and masks:
        names = list(masks)
        chosen = ops.keep_top(
            [scores[n] for n in names],
            [masks[n] for n in names],
            keep_count(masks.kept, keeps[names[0]]),
            seed,
            [stream_of(keys[n]) for n in names],
        )
        return Masks(dict(zip(names, chosen, strict=True)))
    return Masks(
        {
            name: ops.keep_top(
                scores[name],
                mask,
                keep_count(int(mask.count_nonzero()), keeps[name]),
                seed,
                stream_of(keys[name]),
            )
            for name, mask in masks.items()
        }
    )


def find(choice: Any, table: Mapping[str, Any], what: str) -> Any:
    """The function that a choice means: itself, or the one of its name in the table.

    Raises:
        ValueError: the table has no such name; the message lists those it has.
    """
    if callable(choice):
        return choice
    if choice not in table:
        raise ValueError(
            f"{what} must be one of {', '.join(table)}, or a function; got {choice!r}."
        )
    return table[choice]


def _scores(
    name: str, score: Criterion, w_init: Tensor, w_final: Tensor, mask: Tensor, stream: Stream
) -> Tensor:
    """Scores of one layer in the layer's shape; pruned entries, which nobody reads, hold 0."""
    live = score(w_init.detach()[mask], w_final.detach()[mask], stream)
    if live.shape != (int(mask.count_nonzero()),):
        raise ValueError(
            f"criterion returned shape {tuple(live.shape)} for {name}, expected one score per "
            f"kept weight, ({int(mask.count_nonzero())},)."
        )
    if live.is_floating_point() and live.isnan().any():
        raise ValueError(
            f"scores of {name} hold NaN at {int(live.isnan().sum())} of {live.numel()} kept "
            "weights; did the training diverge?"
        )
    return torch.zeros(mask.shape, dtype=live.dtype, device=mask.device).masked_scatter(mask, live)


def _check_kinds(w_init: object, w_final: object, masks: object) -> None:
    """Raises TypeError for a model in place of its state_dict or masks, ValueError for no masks."""
    for argument, given, instead in (
        ("w_init", w_init, "model.state_dict()"),
        ("w_final", w_final, "model.state_dict()"),
        ("masks", masks, "ls.masks_of(model)"),
    ):
        if not isinstance(given, Mapping) or isinstance(given, nn.Module):
            raise TypeError(
                f"{argument} must map names to tensors, got {type(given).__name__}; pass {instead}."
            )
    if not masks:
        raise ValueError(
            "masks is empty: the model has no masked layer; call ls.sparsify_(model) first, which "
            "warns where it finds no layer to mask."
        )


def _named(argument: str, weights: Mapping[str, Tensor], masks: Masks) -> dict[str, Tensor]:
    """The weights by the names of the masks; ValueError if one is missing or has another shape."""
    there = matched(masks, weights, "masks")
    for name, mask in masks.items():
        if there[name] not in weights:
            raise ValueError(
                f"{argument} has no {shown(name)}, which masks has; it has "
                f"{shown(', '.join(weights), most=2000)}."
            )
        if weights[there[name]].shape != mask.shape:
            raise ValueError(
                f"{argument}[{there[name]!r}] has shape {tuple(weights[there[name]].shape)}, but "
                f"its mask has {tuple(mask.shape)}."
            )
    return {name: weights[there[name]] for name in masks}


def check_keep(keep: Keep | Mapping[str, Keep], scope: str, masks: Masks) -> dict[str, Keep]:
    """The fraction to keep of each name.

    Raises:
        ValueError: a fraction is outside [0, 1], a name has no mask, or scope is unknown.
    """
    if scope not in ("layer", "global"):
        raise ValueError(f'scope must be "layer" or "global", got {scope!r}.')
    if not isinstance(keep, Mapping):
        keep_count(1, keep)
        return dict.fromkeys(masks, keep)
    if scope == "global":
        raise ValueError("keep must be one fraction for global scope, got one per name.")
    there = matched(keep, masks, "keep")
    for name, fraction in keep.items():
        if there[name] not in masks:
            raise ValueError(
                f"keep names {shown(name)}, which has no mask; masks: "
                f"{shown(', '.join(masks), most=2000)}."
            )
        keep_count(1, fraction)
    return dict.fromkeys(masks, 1) | {there[name]: fraction for name, fraction in keep.items()}
