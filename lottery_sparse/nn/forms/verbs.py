"""The five forms of a model: each verb gives its form, in place, from whatever form the model has.

    form        the Parameter holds                              verb
    dense       every weight                                     densify_
    masked      every weight, frozen values where pruned         sparsify_
    compact     kept weights only                                compact_
    supermask   scores; weights are frozen                       supermask_
    packed      nothing; buffers hold what inference reads       pack_

A verb acts on the layers that are in one of our forms, and on dense layers if there are none;
`sparsify_` masks dense layers in any case.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn

from lottery_sparse.nn.forms.compacting import expand_layers_, shrink_layers_
from lottery_sparse.nn.forms.convert import (
    become,
    by_parameter,
    check_masked,
    mask_layers_,
    set_masks_,
)
from lottery_sparse.nn.forms.densify import densify_layers_, packed_modules, unpack_
from lottery_sparse.nn.forms.learning import fix_masks_, supermask_layers_
from lottery_sparse.nn.forms.pack import pack_layers_
from lottery_sparse.nn.masked import Masked, MaskedLinear
from lottery_sparse.nn.packed import PackedLinear
from lottery_sparse.nn.supermask import Supermask, check_options

FilterFn = Callable[[nn.Module, str], bool]
Learned = str | int | Mapping[str, Tensor]
OURS = (Masked, Supermask, PackedLinear)


def sparsify_(
    model: nn.Module,
    filter_fn: FilterFn | None = None,
    *,
    masks: Mapping[str, Tensor] | None = None,
    learned: Learned | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> nn.Module:
    """Turn a model into its masked form, in place: dense Parameters under masks that hold.

    nn.Linear and nn.Conv2d layers become masked, and so do layers in any other form of ours:

    - Dense: modules keep their identity, Parameters (so an optimizer built before stays valid),
      device, dtype, hooks and training flag; every weight is kept until `set_masks_`. Biases and
      normalisation layers are never masked.
    - Compact: a dense Parameter takes the place of the kept weights; `optimizer` gets it, with 0
      for the state of pruned weights.
    - Supermask: a layer computes what it computed when evaluated with its mask (`learned`): where
      it rescales, its weights are multiplied by the factor. Weights and biases have requires_grad
      again, scores are gone.
    - Packed: the mask keeps what is not zero, the weights are decoded. They stay frozen as
      `ls.pack_` left them: `model.requires_grad_()` comes before a training.

    A layer whose weight is read without its forward being called is skipped with a warning that
    names it, since gradients would flow to pruned weights there: `out_proj` of
    nn.MultiheadAttention, the two linear layers of nn.TransformerEncoderLayer (its fast path),
    `linear` of nn.LinearCrossEntropyLoss, layers whose weight another kind of module shares,
    parametrized layers, layers with a forward of their own, and other subclasses. Where nothing
    can be masked, a warning names the types of modules that hold the weights.

    Of layers pruned by `torch.nn.utils.prune` the mask is taken over and its hook goes: the
    Parameter `weight_orig`, the same object, is `weight` again. A bias that it prunes goes on being
    pruned by it (`bias_orig`, `bias_mask`), as our masks are of weights; `ls.pack_` and
    `ls.dense_state_dict` take what is left of it.

    >>> model = ls.sparsify_(nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 10)))
    >>> ls.masks_of(model).density
    1.0

    Args:
        model: any module; a single nn.Linear or nn.Conv2d too.
        filter_fn: (module, name) -> whether that layer becomes masked; None = all of them. Layers
            that it leaves out stay as they are, without a warning.
        masks: masks to set at the end, by `set_masks_`; None: the model keeps those it has.
        learned: which masks supermask layers take, as for `ls.learning.use_masks_`, except that
            "sample" is sample 0; None: those of `masks_of`.
        optimizer: the optimizer of compact layers' Parameters; see also `set_masks_`.

    Returns:
        `model`.

    Raises:
        ValueError: the optimizer holds state that cannot move, or `masks` do not fit.
        TypeError: a supermask layer is a subclass with behaviour of its own.

    Warns:
        UserWarning: a layer was skipped; hooks on the gradient of a Parameter that is replaced.
    """
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(
            f"filter_fn must be (module, name) -> bool, got {type(filter_fn).__name__}; give an "
            "optimizer by name, optimizer=."
        )
    if learned is not None and not _has(model, Supermask):
        raise ValueError("learned chooses masks of supermask layers, and the model has none.")
    leaves: set[int] = set()
    if filter_fn is not None:
        ours = ((name, m) for name, m in model.named_modules() if isinstance(m, OURS))
        leaves = {id(m) for name, m in ours if not filter_fn(m, name)}
    expand_layers_(model, optimizer, leaves)
    if _has(model, Supermask):
        fix_masks_(model, learned, leaves)
    _mask_packed(model, leaves)
    mask_layers_(model, filter_fn)
    if masks is not None:
        set_masks_(model, masks, optimizer=optimizer)
    return model


def compact_(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, spare: int = 0
) -> nn.Module:
    """Turn a model into its compact form, in place: Parameters that hold kept weights only.

    Parameter, gradient and optimizer state get the size of what is kept, [C] instead of [N, K].
    The layers compute the same; their state_dict stays that of the masked form. Zeros that a mask
    keeps take slots and train; `ls.Masks.of_nonzero` makes masks without them. The weights are new
    Parameters, so compact before the optimizer is built, or pass it. Supermask and packed layers
    become masked first, as by `sparsify_`; of a dense model every weight is kept.

    The number of slots is fixed from here on: a later mask may keep as many weights, or fewer.
    A vector has no fans, so torch.nn.init's xavier_ and kaiming_ functions raise for `layer.weight`
    itself. Inside `model.apply(fn)` they get a dense weight, and draw what they draw for the masked
    layer. Elsewhere use layer.reset_parameters(), or initialise before this call.

    Averages through state_dict() average dense weights. Averages of Parameters (AveragedModel,
    target networks) go slot by slot: do not average across a mask change, since the same slot then
    holds different weights. Such a copy raises; see `set_masks_`.

    Rules that go by `p.dim()` (weight decay for two dimensions and more, Muon for matrices) take a
    compact Parameter, a vector, for a bias. `ls.optim.param_groups` sorts by what a Parameter was,
    and `ls.sparsify_` gives the matrices back to optimizers that need them.

    Memory: besides the Parameter a layer holds its mask, a byte per weight of the dense layer;
    lists of 8 bytes per slot (12 beyond 65,536 rows or columns); and a dense weight for the dense
    library and for readers. Where most weights are kept, that is more than the dense layer. The
    state_dict is that of the masked form, dense weights and a bool mask: 1.25 times the bytes of
    the dense one in float32, 1.5 times in 16 bits, and the weights once more where frozen values
    are a tensor. `ls.dense_state_dict` has no masks, `ls.Ticket` has them as bits, and the state
    of `ls.pack_` is never larger than dense.

    >>> model = ls.sparsify_(nn.Sequential(nn.Linear(784, 300)))
    >>> ls.set_masks_(model, {"0.weight": torch.rand(300, 784) < 0.1})
    >>> ls.compact_(model)[0].weight.dim()
    1

    Args:
        model: any model. Compact layers stay as they are; they give up dense weights that nothing
            reads any more.
        optimizer: if given, its groups get the new Parameters, and per-element state moves along.
        spare: slots of each layer (and network) beyond those that its mask needs.

    Returns:
        `model`.

    Raises:
        TypeError: a layer is a subclass with behaviour of its own.
        ValueError: there is no layer that can be masked, one is on the meta device, layers share a
            weight under two masks, `spare` is negative, or the optimizer holds state that cannot
            move, such as the history of LBFGS.

    Warns:
        UserWarning: hooks on the gradient of a Parameter that is replaced, which stay behind.
    """
    if spare < 0:
        raise ValueError(f"spare must be 0 or more, got {spare}.")
    _masked_or_compact(model)
    return shrink_layers_(model, optimizer, spare)


def supermask_(
    model: nn.Module,
    weights: str = "init",
    rescale: bool = False,
    init_score: float = 0.0,
    seed: int | torch.Generator | None = 0,
    *,
    round_mask: bool = False,
    evaluation: str = "sample",
    filter_fn: FilterFn | None = None,
) -> nn.Module:
    """Turn a model into its supermask form, in place: weights are frozen, and masks are learned.

    Modules keep their identity, weights, biases, device, dtype and hooks. Without a `filter_fn`,
    masked, compact and packed layers learn a mask; in a model that has none of these, all nn.Linear
    and nn.Conv2d layers do. They freeze the weights they computed with. Afterwards the scores are
    the only Parameters with requires_grad. Parameters of layers that `filter_fn` leaves out, and of
    other modules (normalisation, say), are frozen too; set requires_grad again where they should
    train. Build the optimizer afterwards.

    A layer holds a score beside each weight, in memory and in the state_dict: twice the bytes of
    the dense layer, and a byte a weight more after `ls.learning.use_masks_` with a number or with
    masks. `ls.Ticket.of` saves the mask, a bit a weight, and the seed that gave the weights.

    >>> model = ls.supermask_(dense(), weights="signed_constant", rescale=True)
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['0.score', '2.score']

    Args:
        model: any module; a single layer too.
        weights: "init": those the model holds; "signed_constant": their signs times the population
            standard deviation of the layer.
        rescale: a layer's weights are divided by the share of them that its mask keeps.
        init_score: every score at the start: 0 uses a weight with probability 1/2.
        seed: of the masks' draws; each layer draws in a stream of its name, without what wrappers
            (torch.compile, DistributedDataParallel, FSDP) add to it.
        round_mask, evaluation: see `ls.nn.SupermaskLinear`.
        filter_fn: (module, name) -> whether to learn a mask for that layer; None = all of them.

    Returns:
        `model`.

    Raises:
        TypeError: a layer cannot learn a mask (its weight is shared, computed, or read by another
            module); the message names it. Nothing is changed then.
        ValueError: an option has no such value, or no layer is left: those that learn a mask
            already stay as they are.
    """
    ours = {name: m for name, m in model.named_modules() if isinstance(m, Masked | PackedLinear)}
    if filter_fn is not None:
        ours = {name: m for name, m in ours.items() if filter_fn(m, name)}
    check_options(weights, init_score, evaluation)
    for name, layers in by_parameter(nn.ModuleDict({n or "0": m for n, m in ours.items()})):
        if len(layers) > 1:
            raise TypeError(
                f"{name} cannot learn a mask: its weight is shared with another layer; leave both "
                "out with filter_fn."
            )
    densify_layers_(nn.ModuleList(ours.values()))
    own = {id(m) for m in ours.values()}

    def chosen(module: nn.Module, name: str) -> bool:
        if id(module) in own or filter_fn is None:
            return not own or id(module) in own
        return filter_fn(module, name)

    return supermask_layers_(
        model, chosen, seed,
        weights=weights, rescale=rescale, init_score=init_score, round_mask=round_mask,
        evaluation=evaluation,
    )  # fmt: skip


def pack_(
    model: nn.Module,
    *,
    activations: str = "exact",
    report: Callable[[str], object] | None = print,
) -> nn.Module:
    """Turn a model into its packed form for inference, in place.

    Each linear layer takes the format that `choose_format` names: ternary where all effective
    weights but zeros have one magnitude (per matrix or per row), else kept weights with columns or
    a bitmap, else dense; zeros count as pruned, whatever the mask says, so a dense model with zeros
    packs as well. No layer takes more bytes than dense, in memory or in the state_dict, which holds
    the same tensors. Frozen values other than zero are weights like the others. Supermask layers
    are packed under the mask that `masks_of` gives. Convolutions become dense nn.Conv2d: there are
    no packed kernels for them. A bias that torch.nn.utils.prune prunes becomes what is left of it.
    The model is set to eval mode, and Parameters that it still has no longer require grad. The
    other verbs are the ways back.

    >>> layer = ls.sparsify_(nn.Linear(784, 300))
    >>> ls.set_masks_(layer, {"weight": torch.rand(300, 784) < 0.05})
    >>> ls.pack_(layer, report=None).format
    'csr'

    Args:
        model: any module; a single layer too.
        activations: "exact", or "int8": ternary layers round each row of their input to 8 bits.
        report: called with a table of the layers, their formats, and their bytes against dense;
            None = silence. With "int8" it shows each layer's relative error for standard normal
            inputs; for your own see `PackedLinear.activation_error`.

    Returns:
        `model`.

    Raises:
        ValueError: `activations` is unknown, or there is no layer that can be masked, or layers
            share a weight under two masks.
        TypeError: a masked layer is a subclass with behaviour of its own, or holds several
            networks side by side.
    """
    if activations not in ("exact", "int8"):
        raise ValueError(f'activations must be "exact" or "int8", got {activations!r}.')
    _masked_or_compact(model, packs=True)
    return pack_layers_(model, activations, report)


def densify_(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
    """Turn a model into its dense form, in place: nn.Linear and nn.Conv2d with effective weights.

    Weights stay in the dtype of the layer. Parameters of masked layers keep their identity; compact
    and packed layers get new ones; supermask layers get the weights under the mask that `masks_of`
    gives. The masks are gone: further training refills pruned weights. What `ls.pack_` froze stays
    frozen, the weights and biases of packed layers among it: `model.requires_grad_()` comes before
    a training. Layers that shared a weight before `ls.pack_` have one each.

    >>> ls.densify_(model)[0]
    Linear(in_features=20, out_features=10, bias=True)

    Args:
        model: any model; other layers stay as they are.
        optimizer: as in `ls.compact_`, for models with compact layers.

    Returns:
        `model`.

    Raises:
        ValueError: layers share a weight under two masks, or the optimizer holds state that cannot
            move.
        TypeError: a layer computes its weight (weight_norm), is a subclass with behaviour of its
            own, which a dense layer would lose, or holds several networks side by side.
    """
    if _has(model, Supermask):
        fix_masks_(model)
    return densify_layers_(model, optimizer)


def _has(model: nn.Module, kind: type[nn.Module]) -> bool:
    return any(isinstance(module, kind) for module in model.modules())


def _masked_or_compact(model: nn.Module, packs: bool = False) -> None:
    """Make layers of our forms masked, unless they are compact; else the dense layers."""
    dense = not any(isinstance(module, OURS) for module in model.modules())
    if _has(model, Supermask):
        fix_masks_(model)
    if not packs or not _has(model, Masked):
        _mask_packed(model)
    if dense:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nothing masked: an error below says so
            mask_layers_(model)
    check_masked(model)


def _mask_packed(model: nn.Module, leaves: Collection[int] = ()) -> None:
    """Turn packed layers into masked ones that keep every nonzero weight."""
    for layer in [m for _, m in packed_modules(model) if id(m) not in leaves]:
        unpack_(layer)
        become(layer, MaskedLinear)
        assert isinstance(layer, MaskedLinear)
        layer._enter_masked(layer.weight != 0)
