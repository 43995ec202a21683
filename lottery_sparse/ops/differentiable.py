"""Gradient and vmap rule of an op, valid under autograd, torch.compile and torch.func alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def differentiable(
    name: str, op: Callable, save: Callable, gradients: Callable, vmap_rule_of: Callable
) -> Callable:
    """Register the rules of `op` and return the function that ops must call.

    torch.library.register_autograd does not work inside torch.func.grad (it builds its
    autograd.Function without setup_context), so under torch.func transforms the call goes through
    an autograd.Function of our own, made of the same rules.

    Args:
        name: qualified name, "lottery_sparse::…".
        op: the overload registered under that name.
        save: (ctx, inputs, output) -> None.
        gradients: (ctx, *output gradients) -> input gradients.
        vmap_rule_of: differentiable function -> (info, in_dims, *args) -> (output, out_dims).
            The rule must call the function it is given: grad levels may lie around the vmap.
    """

    def call(*args: Any) -> Any:
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            return UnderTransforms.apply(*args)
        return op(*args)

    vmap_rule = vmap_rule_of(call)

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

        @staticmethod
        def vmap(info: Any, in_dims: tuple, *args: Any) -> Any:
            return vmap_rule(info, in_dims, *args)

    torch.library.register_autograd(name, gradients, setup_context=save)
    torch.library.register_vmap(name, vmap_rule)
    return call
