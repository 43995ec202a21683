"""Lottery tickets and supermasks in PyTorch: masks that hold, from the science to the kernel."""

from lottery_sparse import ops, optim
from lottery_sparse.channels.drop import Channels, drop_channels
from lottery_sparse.nn.compact.layers import CompactConv2d, CompactLinear
from lottery_sparse.nn.forms.compacting import compact_, expand_, refresh_
from lottery_sparse.nn.forms.convert import masks_of, set_masks_, sparsify_
from lottery_sparse.nn.forms.densify import dense_state_dict, densify_
from lottery_sparse.nn.forms.learning import masked_, sampled, supermask_, use_masks_
from lottery_sparse.nn.forms.pack import pack_
from lottery_sparse.nn.forms.replicate import replicate, select
from lottery_sparse.nn.frozen import Constant, Seeded, SignOf
from lottery_sparse.nn.masked import MaskedConv2d, MaskedLinear
from lottery_sparse.nn.packed import PackedLinear
from lottery_sparse.nn.supermask import SupermaskConv2d, SupermaskLinear
from lottery_sparse.ops.dispatch import use_backend
from lottery_sparse.ops.random import op as random
from lottery_sparse.optim.train_step import train_step
from lottery_sparse.planning.plan import plan
from lottery_sparse.pruning.actions import MASK0_ACTIONS, MASK1_ACTIONS
from lottery_sparse.pruning.criteria import CRITERIA, SIGN_MASKS
from lottery_sparse.pruning.masks import Masks
from lottery_sparse.pruning.prune import prune
from lottery_sparse.tickets.learned import supermask_ticket
from lottery_sparse.tickets.search import find_ticket
from lottery_sparse.tickets.ticket import Ticket

__version__ = "0.1.0"

__all__ = [
    "CRITERIA",
    "MASK0_ACTIONS",
    "MASK1_ACTIONS",
    "SIGN_MASKS",
    "Channels",
    "CompactConv2d",
    "CompactLinear",
    "Constant",
    "MaskedConv2d",
    "MaskedLinear",
    "Masks",
    "PackedLinear",
    "Seeded",
    "SignOf",
    "SupermaskConv2d",
    "SupermaskLinear",
    "Ticket",
    "compact_",
    "dense_state_dict",
    "densify_",
    "drop_channels",
    "expand_",
    "find_ticket",
    "masked_",
    "masks_of",
    "ops",
    "optim",
    "pack_",
    "plan",
    "prune",
    "random",
    "refresh_",
    "replicate",
    "sampled",
    "select",
    "set_masks_",
    "sparsify_",
    "supermask_",
    "supermask_ticket",
    "train_step",
    "use_backend",
    "use_masks_",
]
