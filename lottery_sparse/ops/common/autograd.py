"""Gradient and vmap rule of an op, valid under autograd, torch.compile and torch.func alike."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling, is_dynamo_compiling

from lottery_sparse.ops import dispatch
from lottery_sparse.ops.common.checks import AUTOCAST_KEYS, autocasts
from lottery_sparse.ops.common.torch_private import (
    EagerFunction,
    below,
    dispatch_modes,
    forward_ad,
    functorch_is_active,
    is_functorch_wrapped,
)


class Direct:
    """What calls an op, defined under the name `stem` in "lottery_sparse::".

    Plain eager tensors go straight to the kernel that dispatch chooses. Everything else
    (torch.compile, export, transforms, tensor subclasses, dispatch modes) takes the registered op.
    """

    casts = False  # whether autocast casts the arguments

    def __init__(self, stem: str) -> None:
        self.stem, self._name = stem, f"lottery_sparse::{stem}"
        self._op = getattr(torch.ops.lottery_sparse, stem).default
        self._arguments = dispatch.arguments_of(stem)
        torch.library.impl(self._name, "default", self.run)
        torch.library.register_vmap(self._name, self.vmap)
        torch.library.register_fake(self._name, self.fake)
        if self.casts:
            for device, key in AUTOCAST_KEYS.items():
                torch.library.impl(self._name, key, partial(self._cast_and_call, device, key))

    def run(self, *args: Any) -> Any:
        """What the kernel that dispatch chooses computes."""
        own = args if self._arguments is None else self._arguments(*args)
        return dispatch.kernel(self.stem, args[0].device, own)(*own)

    def fake(self, *args: Any) -> Any:
        """Tensors without numbers of the shapes that `run` returns."""
        return dispatch.run_on("reference", self.stem, *args)

    def vmap(self, info: Any, in_dims: tuple, *args: Any) -> tuple[Any, Any]:
        """The rule of torch.vmap: (output, its vmapped dimensions)."""
        raise NotImplementedError

    def cast(self, args: tuple, device: str) -> tuple:
        """The arguments as autocast has them.

        They are cast before torch.func saves anything, or dy and x would differ in dtype.
        """
        return cast_all_of(args, device)

    def _cast_and_call(self, device: str, key: str, *args: Any) -> Any:
        with below(key):
            return self._op(*self.cast(args, device))

    def __call__(self, *args: Any) -> Any:
        kind = args[0].device.type
        if self.casts and autocasts(kind):
            args = self.cast(args, kind)
        if is_dynamo_compiling() or functorch_is_active() or dispatch_modes() != 0:
            return self._op(*args)
        for a in args:  # written out: a frame of Python for each would show
            if isinstance(a, Tensor) and (type(a) not in _PLAIN or a.is_meta or _outlived(a)):
                return self._op(*args)
        own = args if self._arguments is None else self._arguments(*args)
        return dispatch.kernel(self.stem, args[0].device, own)(*own)


class Differentiable(Direct):
    """What calls an op that has gradients.

    Its rules are methods, and reach the kernel on three ways:

    - plain eager tensors go straight to the kernel through an autograd.Function: a registered
      op with gradients costs 45 µs more a call, twice the arithmetic of a small layer;
    - torch.func transforms take an autograd.Function with setup_context, because what
      torch.library.register_autograd builds does not work inside torch.func.grad;
    - everything else (torch.compile, export, tensor subclasses, dispatch modes) takes the op.
    """

    def __init__(self, stem: str) -> None:
        super().__init__(stem)
        rules = {
            "backward": staticmethod(self.gradients),
            "jvp": staticmethod(partial(no_forward_mode, stem)),
        }
        eager = type("Eager", (EagerFunction,), {"forward": staticmethod(self.forward), **rules})
        transformed = {
            "forward": staticmethod(self._op),
            "setup_context": staticmethod(self.save),
            "vmap": staticmethod(self.vmap),
        }
        under = type("UnderTransforms", (torch.autograd.Function,), {**transformed, **rules})
        self._eager: Any = eager.apply  # pyright: ignore[reportAttributeAccessIssue]
        self._under_transforms: Any = under.apply  # pyright: ignore[reportAttributeAccessIssue]
        torch.library.register_autograd(self._name, self.gradients, setup_context=self.save)

    def save(self, ctx: Any, inputs: tuple, output: Any) -> None:
        """Keep what `gradients` reads."""
        raise NotImplementedError

    def gradients(self, ctx: Any, *grads: Any) -> Any:
        """The gradients of all arguments, from those of the outputs."""
        raise NotImplementedError

    def forward(self, ctx: Any, *args: Any) -> Any:
        """A plain eager call that asks for gradients."""
        own = args if self._arguments is None else self._arguments(*args)
        output = dispatch.kernel(self.stem, args[0].device, own)(*own)
        self.save(ctx, args, output)
        return output

    def __call__(self, *args: Any) -> Any:
        kind = args[0].device.type
        if self.casts and kind in AUTOCAST_KEYS and torch.is_autocast_enabled(kind):
            args = self.cast(args, kind)
        if is_dynamo_compiling():
            return self._op(*args)
        if functorch_is_active():
            return self._under_transforms(*args)
        if dispatch_modes() != 0:
            return self._op(*args)
        asks, enabled = forward_ad._current_level >= 0, torch.is_grad_enabled()
        for a in args:
            if isinstance(a, Tensor):
                if type(a) not in _PLAIN or a.is_meta or _outlived(a):
                    return self._op(*args)
                asks = asks or (enabled and a.requires_grad)
        if asks:  # or a tangent, which the kernel alone would lose
            return self._eager(*args)
        return self.run(*args)


def no_forward_mode(stem: str, ctx: Any, *tangents: Any) -> Any:
    """The rule for tangents: ops have none, and say so."""
    raise NotImplementedError(
        f"{stem} has no forward-mode derivative (jvp, jacfwd, hessian, dual numbers); use "
        "reverse mode: torch.func.vjp or jacrev."
    )


def cast_all_of(args: tuple, device: str) -> tuple:
    """Every floating tensor in the autocast dtype, as F.linear casts its own."""
    dtype = torch.get_autocast_dtype(device)
    return tuple(cast_one(a, device, dtype) for a in args)


def cast_one(value: Any, device: str, dtype: torch.dtype) -> Any:
    eligible = (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.device.type == device
        and value.dtype != torch.float64
    )
    return value.to(dtype) if eligible else value


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
