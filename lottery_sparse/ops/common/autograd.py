"""Gradient and vmap rule of an op, valid under autograd, torch.compile and torch.func alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


def differentiable(
    name: str,
    op: Callable,
    run: Callable,
    save: Callable,
    gradients: Callable,
    vmap_rule_of: Callable,
    carrying: Callable | None = None,
) -> Callable:
    """Register the rules of `op` and return the function that ops must call.

    The same rules reach the kernel on three ways:

    - plain eager tensors go straight to the kernel through an autograd.Function: a registered
      op with gradients costs 45 µs more a call, twice the arithmetic of a small layer;
    - torch.func transforms take an autograd.Function with setup_context, because what
      torch.library.register_autograd builds does not work inside torch.func.grad;
    - everything else (torch.compile, export, tensor subclasses, dispatch modes) takes the op.

    Args:
        name: qualified name, "lottery_sparse::…".
        op: the overload registered under that name.
        run: the kernel behind the op, on plain tensors.
        save: (ctx, inputs, output) -> None.
        gradients: (ctx, *output gradients) -> input gradients.
        vmap_rule_of: differentiable function -> (info, in_dims, *args) -> (output, out_dims).
            The rule must call the function it is given: grad levels may lie around the vmap.
        carrying: the kernel with a second result, a tensor for its own backward; where plain
            eager tensors need gradients it takes the place of `run`, and `save` gets that tensor
            as a fourth argument.
    """

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*args)
        if torch._C._are_functorch_transforms_active():
            return UnderTransforms.apply(*args)
        tensors = [a for a in args if isinstance(a, Tensor)]
        if not unwatched(tensors):
            return op(*args)
        grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        if grad or forward_ad._current_level >= 0:  # the kernel alone would lose a tangent
            return Eager.apply(*args)
        return run(*args)

    vmap_rule = vmap_rule_of(call)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            if carrying is None:
                output = run(*args)
                save(ctx, args, output)
            else:
                output, carried = carrying(*args)
                save(ctx, args, output, carried)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return gradients(ctx, *grads)

        jvp = no_forward_mode(name)

    class UnderTransforms(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            return op(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
            save(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return gradients(ctx, *grads)

        jvp = no_forward_mode(name)

        @staticmethod
        def vmap(info: Any, in_dims: tuple, *args: Any) -> Any:
            return vmap_rule(info, in_dims, *args)

    torch.library.register_autograd(name, gradients, setup_context=save)
    torch.library.register_vmap(name, vmap_rule)
    return call


def no_forward_mode(name: str) -> staticmethod:
    """The rule for tangents: ops have none, and say so."""
    stem = name.partition("::")[2]

    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(
            f"{stem} has no forward-mode derivative (jvp, jacfwd, hessian, dual numbers); use "
            "reverse mode: torch.func.vjp or jacrev."
        )

    return staticmethod(jvp)


def direct(op: Callable, run: Callable) -> Callable:
    """For an op without gradients: the function that takes the first or third way above."""

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return op(*args)
        return run(*args) if unwatched([a for a in args if isinstance(a, Tensor)]) else op(*args)

    return call


_PLAIN = (Tensor, nn.Parameter)


def is_plain_eager(x: Any) -> bool:
    """Whether torch's own layers may take x: no graph, transform or tangent asks for an op."""
    return (
        type(x) in _PLAIN
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def unwatched(tensors: list[Tensor]) -> bool:
    """Real tensors, and nobody watches the dispatcher."""
    return torch._C._len_torch_dispatch_stack() == 0 and all(
        type(t) in _PLAIN and not t.is_meta for t in tensors
    )
