"""Lottery tickets and supermasks in PyTorch: masks that hold, from the science to the kernel.

Namespaces:

    nn         layers of all forms, and `refresh_`
    pruning    CRITERIA, MASK1_ACTIONS, MASK0_ACTIONS, SIGN_MASKS: name -> function
    frozen     what pruned weights hold: Constant, Seeded; SignOf for starts of tickets
    learning   learned masks: use_masks_, sampled
    ensemble   several networks side by side: replicate, select
    channels   channels that masks empty: drop_channels, Channels
    optim      SGD, Adam, AdamW for compact models, and param_groups
    ops        the functions below the layers
    random     draws that are the same on every machine
"""

from lottery_sparse import channels, ensemble, learning, nn, ops, optim, pruning
from lottery_sparse.nn import frozen
from lottery_sparse.nn.forms.convert import masks_of, set_masks_
from lottery_sparse.nn.forms.densify import dense_state_dict
from lottery_sparse.nn.forms.verbs import compact_, densify_, pack_, sparsify_, supermask_
from lottery_sparse.old_names import keep_old_modules, old_name
from lottery_sparse.ops.dispatch import use_backend
from lottery_sparse.ops.random import op as random
from lottery_sparse.optim.train_step import train_step
from lottery_sparse.planning.plan import plan
from lottery_sparse.pruning.masks import Masks
from lottery_sparse.pruning.prune import prune
from lottery_sparse.tickets.search import find_ticket
from lottery_sparse.tickets.ticket import Ticket

__version__ = "0.1.0"

keep_old_modules()

__all__ = [
    "Masks",
    "Ticket",
    "channels",
    "compact_",
    "dense_state_dict",
    "densify_",
    "ensemble",
    "find_ticket",
    "frozen",
    "learning",
    "masks_of",
    "nn",
    "ops",
    "optim",
    "pack_",
    "plan",
    "prune",
    "pruning",
    "random",
    "set_masks_",
    "sparsify_",
    "supermask_",
    "train_step",
    "use_backend",
]


def __getattr__(name: str) -> object:
    return old_name(name)
