"""Names that were at the top before: they work for one release, and warn once each."""

from __future__ import annotations

import importlib
import sys
import warnings
from functools import cache
from typing import Any

import torch

# old name in lottery_sparse -> (module, name there, the new name as users write it)
OLD_NAMES: dict[str, tuple[str, str, str]] = {
    "CRITERIA": ("pruning", "CRITERIA", "ls.pruning.CRITERIA"),
    "MASK0_ACTIONS": ("pruning", "MASK0_ACTIONS", "ls.pruning.MASK0_ACTIONS"),
    "MASK1_ACTIONS": ("pruning", "MASK1_ACTIONS", "ls.pruning.MASK1_ACTIONS"),
    "SIGN_MASKS": ("pruning", "SIGN_MASKS", "ls.pruning.SIGN_MASKS"),
    "Channels": ("channels", "Channels", "ls.channels.Channels"),
    "drop_channels": ("channels", "drop_channels", "ls.channels.drop_channels"),
    "CompactConv2d": ("nn", "CompactConv2d", "ls.nn.CompactConv2d"),
    "CompactLinear": ("nn", "CompactLinear", "ls.nn.CompactLinear"),
    "MaskedConv2d": ("nn", "MaskedConv2d", "ls.nn.MaskedConv2d"),
    "MaskedLinear": ("nn", "MaskedLinear", "ls.nn.MaskedLinear"),
    "PackedLinear": ("nn", "PackedLinear", "ls.nn.PackedLinear"),
    "SupermaskConv2d": ("nn", "SupermaskConv2d", "ls.nn.SupermaskConv2d"),
    "SupermaskLinear": ("nn", "SupermaskLinear", "ls.nn.SupermaskLinear"),
    "refresh_": ("nn", "refresh_", "ls.nn.refresh_"),
    "Constant": ("nn.frozen", "Constant", "ls.frozen.Constant"),
    "Seeded": ("nn.frozen", "Seeded", "ls.frozen.Seeded"),
    "SignOf": ("nn.frozen", "SignOf", "ls.frozen.SignOf"),
    "replicate": ("ensemble", "replicate", "ls.ensemble.replicate"),
    "select": ("ensemble", "select", "ls.ensemble.select"),
    "sampled": ("learning", "sampled", "ls.learning.sampled"),
    "use_masks_": ("learning", "use_masks_", "ls.learning.use_masks_"),
    "expand_": ("old_names", "_expand_", "ls.sparsify_"),
    "masked_": ("old_names", "_masked_", "ls.sparsify_(model, learned=...)"),
    "supermask_ticket": ("old_names", "_supermask_ticket", "ls.Ticket.of"),
}


# Modules whose classes pickles name: what torch.save made of a whole model, of Masks or a Ticket.
OLD_MODULES: dict[str, str] = {
    "compact": "ops.compact.kept",
    "compact_layers": "nn.compact.layers",
    "frozen": "nn.frozen",
    "masks": "pruning.masks",
    "modules": "nn.masked",
    "packed": "nn.packed",
    "supermask": "nn.supermask",
    "ticket": "tickets.ticket",
    "ticket_file": "tickets.file",
}
SAFE = ("Constant", "Seeded", "SignOf", "Masks", "Ticket", "Saved")  # torch.load may make these


def keep_old_modules() -> None:
    """Have pickles find classes where they were. All of these modules are imported by now."""
    for old, new in OLD_MODULES.items():
        module = importlib.import_module(f"lottery_sparse.{new}")
        sys.modules.setdefault(f"lottery_sparse.{old}", module)
        known: list[Any] = [
            (vars(module)[n], f"lottery_sparse.{old}.{n}") for n in SAFE if n in vars(module)
        ]
        torch.serialization.add_safe_globals(known)


@cache
def old_name(name: str) -> Any:
    """The object that an old name of `lottery_sparse` means; the first use of each name warns.

    Raises:
        AttributeError: it was never one.
    """
    if name not in OLD_NAMES:
        raise AttributeError(f"module 'lottery_sparse' has no attribute {name!r}")
    module, there, new = OLD_NAMES[name]
    warnings.warn(
        f"lottery_sparse.{name} is now {new}; the old name goes with the next release.",
        FutureWarning,
        stacklevel=3,
    )
    return getattr(importlib.import_module(f"lottery_sparse.{module}"), there)


def _expand_(model: Any, optimizer: Any = None) -> Any:
    from lottery_sparse.nn.forms.compacting import expand_layers_

    return expand_layers_(model, optimizer)


def _masked_(model: Any, masks: Any = None) -> Any:
    from lottery_sparse.nn.forms.learning import fix_masks_

    return fix_masks_(model, masks)


def _supermask_ticket(model: Any, sources: Any = None) -> Any:
    from lottery_sparse.nn.forms.learning import learned_layers
    from lottery_sparse.tickets.ticket import Ticket

    learned_layers(model)  # raises where there is none
    return Ticket.of(model, sources)
