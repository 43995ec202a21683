"""One draw for a forward and its recomputation, under torch.utils.checkpoint.

Gradient checkpointing drops what a forward saved, and runs the forward again in the backward. A
layer that draws a mask must draw the same mask again. torch keeps one object for each checkpointed
call; the forward and the recomputation both have it on their stacks. The keys that a call draws are
kept on that object. The recomputation takes them from there, in the order of the draws.
"""

from __future__ import annotations

import inspect
import sys
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch.utils import checkpoint

from lottery_sparse.ops.common.torch_private import (
    checkpoint_hook,
    current_backward,
    top_saved_tensors_hooks,
)

_HELD_AS = "_lottery_sparse_draws"


class Draws:
    """The keys that were drawn in one checkpointed call, and how many of them a backward took."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.taken: dict[Any, int] = {}

    @classmethod
    def of(cls, call: Any) -> Draws:
        if not hasattr(call, _HELD_AS):
            setattr(call, _HELD_AS, cls())
        return getattr(call, _HELD_AS)

    def take(self, backward: Any) -> Tensor:
        """The next key for a backward; each backward begins with the first key."""
        at = self.taken.get(backward, 0)
        if at == len(self.keys):
            raise RuntimeError(OTHERWISE)
        self.taken[backward] = at + 1
        return self.keys[at]


OTHERWISE = (
    "a layer with a learned mask runs in a backward, and it is not known which mask its forward "
    "drew; checkpoint it by torch.utils.checkpoint.checkpoint with the same function and inputs, "
    "or leave it out of what is recomputed."
)


def next_key(counter: Tensor) -> Tensor:
    """The key of the next draw; `counter` moves on to the draw after it.

    In a recomputation of a checkpointed forward the result is the key that the forward drew, and
    the counter stays.

    Args:
        counter: int64 [3] or [E, 3], of `ls.random.key`; changed in place.

    Raises:
        RuntimeError: the layer runs in a backward, and not in a recomputation of
            torch.utils.checkpoint.
    """
    backward = current_backward()
    if backward == -1:  # cheap, as every forward asks: checkpoint sets hooks, or forbids gradients
        hooked = top_saved_tensors_hooks(False) is not None
        if not hooked and (torch.is_grad_enabled() or torch.is_inference_mode_enabled()):
            return advance(counter)
    drawing, repeating, number = _calls()
    if repeating is not None:
        key = Draws.of(repeating).take(backward if number is None else number)
    elif backward != -1:
        raise RuntimeError(OTHERWISE)
    else:
        key = advance(counter)
    for call in drawing:
        if call is not None:
            Draws.of(call).keys.append(key)
    return key


def advance(counter: Tensor) -> Tensor:
    """The key that `counter` is at, after which it is at the next one."""
    key = counter.clone()
    counter.select(-1, 2).add_(1)
    return key


torch.library.define("lottery_sparse::next_key", "(Tensor counter) -> (Tensor, Tensor)")
key_and_next = torch.ops.lottery_sparse.next_key.default


@torch.library.impl("lottery_sparse::next_key", "default")
def _key_and_next(counter: Tensor) -> tuple[Tensor, Tensor]:
    """The key of the next draw and the counter after it, for compiled graphs.

    The new counter is another tensor: a compiled backward may compute its forward again, and then
    reads the counter that the forward read.
    """
    after = counter.clone()
    if current_backward() != -1 and _calls()[1] is None:
        return advance(after), after
    return next_key(after).clone(), after  # Inductor reuses the memory of what an op returns


@torch.library.register_fake("lottery_sparse::next_key")
def _fake(counter: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(counter), torch.empty_like(counter)


def _calls() -> tuple[list[Any], Any, Any]:
    """The checkpointed calls that run here, from the innermost one outwards.

    Returns:
        drawing: those that run for the first time.
        repeating: the innermost one that is computed again; None if there is none.
        number: of the backward that it is computed for, as torch counts; None where it says none.
    """
    drawing: list[Any] = []
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code is _REENTRANT:
            drawing.append(frame.f_locals["ctx"])
        elif code is _REENTRANT_AGAIN:
            return drawing, frame.f_locals["ctx"], None
        elif code is _CHECKPOINT:
            call = frame.f_locals.get("gen")  # none if reentrant
            if call is not None and call.gi_frame is not None:
                drawing.append(call.gi_frame.f_locals.get("new_frame"))
        elif code is _AGAIN:
            return drawing, frame.f_locals.get("frame"), frame.f_locals.get("gid")
        frame = frame.f_back
    return drawing, None, None


def _nested(kind: Any, name: str) -> CodeType | None:
    """The code of a function that a class defines as it is made."""
    constants = () if kind is None else kind.__init__.__code__.co_consts
    codes = [found for found in constants if isinstance(found, CodeType)]
    return next((code for code in codes if code.co_name == name), None)


# Code of torch itself. If a torch changes one of these, a recomputation raises instead of drawing.
_CHECKPOINT = inspect.unwrap(checkpoint.checkpoint).__code__
_REENTRANT = checkpoint.CheckpointFunction.forward.__code__
_REENTRANT_AGAIN = checkpoint.CheckpointFunction.backward.__code__
_AGAIN = _nested(checkpoint_hook, "unpack_hook")
