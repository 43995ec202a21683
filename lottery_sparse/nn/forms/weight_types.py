"""The types of modules that hold the weights of a model, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

_MOST_NAMED = 6


def shares_of_types(model: nn.Module) -> dict[str, float]:
    """Type of module -> share of the weights that such modules hold themselves, largest first.

    Weights are Parameters of two dimensions and more, or all where there are none; a shared one
    counts for the first module that has it.
    """
    held = [(name, p) for name, p in _held(model) if p.dim() > 1] or list(_held(model))
    counts: Counter[str] = Counter()
    for name, parameter in held:
        counts[name] += parameter.numel()
    total = counts.total()
    return {name: count / total for name, count in counts.most_common()} if total else {}


def _held(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    seen: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if not isinstance(parameter, UninitializedParameter):  # which has no size yet
                yield type(module).__name__, parameter


def none_to_mask(model: nn.Module, refused: Mapping[str, str]) -> str:
    """Why no layer of the model can be masked, and how to go on: the end of a sentence.

    Args:
        refused: name -> why, of the layers that are of a type to mask.
    """
    if any(type(module).__name__ == "PackedLinear" for module in model.modules()):
        return "its layers are packed; ls.sparsify_(model) makes them masked"
    shares = shares_of_types(model)
    if not shares:
        return "it has no weights; give the module that holds them"
    types = [f"{name} {share:.2f}" for name, share in list(shares.items())[:_MOST_NAMED]]
    if len(shares) > _MOST_NAMED:
        types.append(f"{len(shares) - _MOST_NAMED} other types")
    reasons = "".join(f"; {name or 'the model'}: {why}" for name, why in list(refused.items())[:1])
    return (
        "ls.sparsify_ masks nn.Linear and nn.Conv2d, not subclasses of them, and finds none that "
        f"it can mask; shares of the weights by type: {', '.join(types)}{reasons}. Write "
        "nn.Linear or nn.Conv2d layers in place of those that should have masks, and let "
        "filter_fn, if there is one, take them"
    )
