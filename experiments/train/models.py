"""The network that a round trains: which weights it keeps, in which form its layers hold them."""

from functools import partial

import torch
from torch import Tensor, nn

import lottery_sparse as ls
from experiments.study.networks import Network, build, holding, keep_by_parameter
from lottery_sparse.nn.compact.base import Compact
from lottery_sparse.nn.masked import Masked
from lottery_sparse.nn.supermask import Supermask
from lottery_sparse.ops import dispatch
from lottery_sparse.tickets.round import Began

Weights = dict[str, Tensor]  # name -> value of parameters, biases included, and buffers


def dense_start(network: Network, seed: int, device: torch.device | str) -> Began:
    """All weights kept, at the initial values of `seed`."""
    weights = weights_of(build(network, seed, device))
    prunable = keep_by_parameter(network)
    everything = {name: torch.ones_like(weights[name], dtype=torch.bool) for name in prunable}
    return Began(ls.Masks(everything), weights, {}, released=True)


def model_of(network: Network, start: Began, device: torch.device | str) -> nn.Module:
    """The network holding a start: with layers of its form, or plain ones if all weights train."""
    model = holding(network, start.weights, device)
    if network.form == "masked" and not start.released:
        rest_(model, start)
    elif not start.released:
        ls.sparsify_(model)
        frozen = dict.fromkeys(start.masks, "zero") | start.frozen
        ls.set_masks_(model, start.masks, frozen=frozen)
        ls.compact_(model)  # the same numbers; time and memory of the kept weights only
    return model


@torch.no_grad()
def rest_(model: nn.Module, start: Began) -> None:
    """Let the pruned weights of dense layers rest at their values, whose gradients become zero.

    Adam leaves a weight as it is that never has a gradient.
    """
    for name, mask in start.masks.items():
        parameter = model.get_parameter(name)
        parameter.copy_(start.effective(name))
        pruned = mask.logical_not().to(parameter.device)
        parameter.register_post_accumulate_grad_hook(partial(_rest_gradient, pruned))


def _rest_gradient(pruned: Tensor, parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.masked_fill_(pruned, 0)


def weights_of(model: nn.Module) -> Weights:
    """Copies of the weights the network computes with, dense, of its biases and buffers."""
    state = ls.dense_state_dict(model)
    return {n: value.clone(memory_format=torch.contiguous_format) for n, value in state.items()}


def moving_buffers(model: nn.Module) -> list[Tensor]:
    """What training moves besides parameters, such as the averages of batch norm."""
    ours = Compact | Masked | Supermask
    layers = [layer for layer in model.modules() if not isinstance(layer, ours)]
    return [buffer for layer in layers for buffer in layer.buffers(recurse=False)]


def backend_of(model: nn.Module) -> dict[str, object]:
    """Whose kernels train the model, and of each layer whether they skip what is pruned."""
    return {
        "backend": kernels_on(next(model.parameters()).device),
        "products": products_of(model),
    }


def kernels_on(device: torch.device) -> str:
    """The backend whose kernels run here, where they are the best choice."""
    ours = {"cpu": "cpu", "cuda": "triton"}.get(device.type)
    runs = ours is not None and dispatch.built(ours) and dispatch.fits(ours, device)
    return dispatch.forced() or (ours if runs and ours else "reference")


def products_of(model: nn.Module) -> list[str]:
    """Of each layer "sparse", where kernels skip what is pruned, or "dense"."""
    return [
        "sparse" if isinstance(layer, Compact) and layer.refreshes_lazily else "dense"
        for layer in model.modules()
        if isinstance(layer, nn.Linear | nn.Conv2d | Compact)
    ]
