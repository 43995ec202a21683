"""Lottery tickets and supermasks in PyTorch: masks that hold, from the science to the kernel."""

from lottery_sparse import ops, optim, random
from lottery_sparse.actions import MASK0_ACTIONS, MASK1_ACTIONS
from lottery_sparse.backends import use_backend
from lottery_sparse.channels import Channels, drop_channels
from lottery_sparse.compact_layers import CompactConv2d, CompactLinear
from lottery_sparse.compacting import compact_, expand_, refresh_
from lottery_sparse.convert import masks_of, set_masks_, sparsify_
from lottery_sparse.criteria import CRITERIA, SIGN_MASKS
from lottery_sparse.densify import dense_state_dict, densify_
from lottery_sparse.frozen import Constant, Seeded, SignOf
from lottery_sparse.masks import Masks
from lottery_sparse.modules import MaskedConv2d, MaskedLinear
from lottery_sparse.pack import pack_
from lottery_sparse.packed import PackedLinear
from lottery_sparse.plan import plan
from lottery_sparse.prune import prune
from lottery_sparse.replicate import replicate, select
from lottery_sparse.step import train_step
from lottery_sparse.supermask import SupermaskConv2d, SupermaskLinear
from lottery_sparse.supermasking import masked_, sampled, supermask_, supermask_ticket, use_masks_
from lottery_sparse.ticket import Ticket
from lottery_sparse.ticket_search import find_ticket

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
