"""Gradient and vmap rule of an op, valid under autograd, torch.compile and torch.func alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling, is_dynamo_compiling

from lottery_sparse.ops import dispatch
from lottery_sparse.ops.common.checks import AUTOCAST_KEYS
from lottery_sparse.ops.common.torch_private import (
    EagerFunction,
    dispatch_modes,
    forward_ad,
    functorch_is_active,
    is_functorch_wrapped,
)


class Differentiable:
    """What calls an op that has gradients: its rules, registered, and three ways to its kernel.

    The same rules reach the kernel on three ways:

    - plain eager tensors go straight to the kernel through an autograd.Function: a registered
      op with gradients costs 45 µs more a call, twice the arithmetic of a small layer;
    - torch.func transforms take an autograd.Function with setup_context, because what
      torch.library.register_autograd builds does not work inside torch.func.grad;
    - everything else (torch.compile, export, tensor subclasses, dispatch modes) takes the op.

    Args:
        stem: the op's name, under which it is defined in "lottery_sparse::".
        save: (ctx, inputs, output) -> None.
        gradients: (ctx, *output gradients) -> input gradients.
        vmap_rule_of: differentiable function -> (info, in_dims, *args) -> (output, out_dims).
            The rule must call the function it is given: grad levels may lie around the vmap.
        cast: (args, device) -> args as autocast has them. They are cast before torch.func saves
            anything, or dy and x would differ in dtype. None: an op that autocast leaves alone.
        run: the kernel, on plain tensors; None: the one that dispatch chooses.
        carrying: the kernel with a second result, a tensor for its own backward; where plain
            eager tensors need gradients it takes the place of `run`, and `save` gets that tensor
            as a fourth argument.
    """

    def __init__(
        self,
        stem: str,
        save: Callable,
        gradients: Callable,
        vmap_rule_of: Callable,
        *,
        cast: Callable | None = None,
        run: Callable | None = None,
        carrying: Callable | None = None,
    ) -> None:
        name = f"lottery_sparse::{stem}"
        op = getattr(torch.ops.lottery_sparse, stem).default
        vmap_rule = vmap_rule_of(self)

        class Eager(EagerFunction):
            @staticmethod
            def forward(ctx: Any, *args: Any) -> Any:
                if carrying is not None:
                    output, carried = carrying(*args)
                    save(ctx, args, output, carried)
                    return output
                output = (run or dispatch.kernel(stem, args[0].device, args))(*args)
                save(ctx, args, output)
                return output

            backward = staticmethod(gradients)
            jvp = no_forward_mode(stem)

        class UnderTransforms(torch.autograd.Function):
            @staticmethod
            def forward(*args: Any) -> Any:
                return op(*args)

            setup_context = staticmethod(save)
            backward = staticmethod(gradients)
            jvp = no_forward_mode(stem)
            vmap = staticmethod(vmap_rule)

        self._stem, self._op, self._cast, self._run = stem, op, cast, run
        self._eager, self._under_transforms = Eager.apply, UnderTransforms.apply  # pyright: ignore[reportAttributeAccessIssue]
        torch.library.impl(name, "default", run or partial(dispatch.run, stem))
        torch.library.register_autograd(name, gradients, setup_context=save)
        torch.library.register_vmap(name, vmap_rule)

    def __call__(self, *args: Any) -> Any:
        device = args[0].device
        kind = device.type
        if self._cast is not None and kind in AUTOCAST_KEYS and torch.is_autocast_enabled(kind):
            args = self._cast(args, kind)
        if is_dynamo_compiling():
            return self._op(*args)
        if functorch_is_active():
            return self._under_transforms(*args)
        if dispatch_modes() != 0:
            return self._op(*args)
        asks, enabled = forward_ad._current_level >= 0, torch.is_grad_enabled()
        for a in args:  # written out: a frame of Python for each would show
            if isinstance(a, Tensor):
                if type(a) not in _PLAIN or a.is_meta or _outlived(a):
                    return self._op(*args)
                asks = asks or (enabled and a.requires_grad)
        if asks:  # or a tangent, which the kernel alone would lose
            return self._eager(*args)
        return (self._run or dispatch.kernel(self._stem, device, args))(*args)


def no_forward_mode(stem: str) -> staticmethod:
    """The rule for tangents: ops have none, and say so."""

    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(
            f"{stem} has no forward-mode derivative (jvp, jacfwd, hessian, dual numbers); use "
            "reverse mode: torch.func.vjp or jacrev."
        )

    return staticmethod(jvp)


class Direct:
    """What calls an op without gradients: the first or third way above."""

    def __init__(self, stem: str) -> None:
        self._stem, self._op = stem, getattr(torch.ops.lottery_sparse, stem).default
        torch.library.impl(f"lottery_sparse::{stem}", "default", partial(dispatch.run, stem))

    def __call__(self, *args: Any) -> Any:
        if is_dynamo_compiling() or functorch_is_active() or dispatch_modes() != 0:
            return self._op(*args)
        for a in args:
            if isinstance(a, Tensor) and (type(a) not in _PLAIN or a.is_meta or _outlived(a)):
                return self._op(*args)
        return dispatch.kernel(self._stem, args[0].device, args)(*args)


_PLAIN = (Tensor, nn.Parameter)
# a tensor of a transform, which it has outlived where none is active
_outlived = is_functorch_wrapped


def is_plain_eager(x: Any) -> bool:
    """Whether torch's own layers may take x: no graph, transform or tangent asks for an op."""
    return (
        type(x) in _PLAIN
        and not is_compiling()
        and dispatch_modes() == 0
        and not functorch_is_active()
        and forward_ad._current_level < 0
    )


def unwatched(args: Iterable[Any]) -> bool:
    """Whether the tensors among these are real ones, and nobody watches the dispatcher."""
    if dispatch_modes() != 0:
        return False
    for a in args:
        if isinstance(a, Tensor) and (type(a) not in _PLAIN or a.is_meta or _outlived(a)):
            return False
    return True
