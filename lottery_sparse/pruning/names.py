"""Names of one model, plain and wrapped: one weight, one key.

torch.compile, DistributedDataParallel, FSDP and their like put the model inside another module,
and a component into the names of its parameters: "0.weight" becomes "_orig_mod.0.weight", or
"module.0.weight". What is drawn from a seed and a name is keyed by the name without these
components, so that one seed gives one mask for the model however it is wrapped; and a name of the
plain model is found in the wrapped one.

A module of your own may be called `module`, too. Its component is left out like a wrapper's. If
that would make two names equal, both keep the component.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

# torch.compile, FullyShardedDataParallel, checkpoint_wrapper: names that nobody gives a module
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# the wrappers that a state_dict does not name
HIDDEN = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module")
MODULE = "module"  # DistributedDataParallel, DataParallel, AveragedModel


def plain(name: str) -> str:
    """The name without the components of wrappers: "module.0._orig_mod.fc" -> "0.fc"."""
    return _without(name, *WRAPPERS, MODULE)


def in_state(name: str) -> str:
    """The name in a state_dict of a parameter that named_parameters() calls `name`.

    FSDP and checkpoint_wrapper add a component to names of parameters, but not in a state_dict.
    """
    return _without(name, *HIDDEN)


def prefix_of(name: str) -> str:
    """The prefix in a state_dict of a module that named_modules() calls `name`: "" or "0."."""
    return in_state(f"{name}." if name else "")


def keys_of(names: Iterable[str]) -> dict[str, str]:
    """Name -> the key of its random draws; different names have different keys.

    The key is the plain name. Two names may have one plain name, if a module of the model's own is
    called `module`. Then both keep that component, except one that all names begin with.
    """
    bare = {name: _without(name, *WRAPPERS) for name in names}
    while bare and all(name.startswith(f"{MODULE}.") for name in bare.values()):
        bare = {name: short.removeprefix(f"{MODULE}.") for name, short in bare.items()}
    count = Counter(map(plain, bare))
    return {name: plain(name) if count[plain(name)] == 1 else bare[name] for name in bare}


def matched(given: Iterable[str], known: Iterable[str], what: str) -> dict[str, str]:
    """Each given name -> the name of the same parameter in `known`, of a model wrapped otherwise.

    Names stay as they are if all of them are known. A name without a counterpart stays, too, and
    the caller refuses it.

    Args:
        what: the argument that holds the names, for the message.

    Raises:
        ValueError: a name may mean several of `known`, or two mean the same one.
    """
    given, known = list(given), dict.fromkeys(known)
    if all(name in known for name in given):
        return {name: name for name in given}
    alike: dict[str, list[str]] = {}
    for name in known:
        alike.setdefault(plain(name), []).append(name)
    ours, theirs = keys_of(given), {key: name for name, key in keys_of(known).items()}
    found: dict[str, str] = {}
    for name in given:
        candidates = alike.get(plain(name), [name])
        if len(candidates) > 1 and len(given) == len(known) and ours[name] in theirs:
            candidates = [theirs[ours[name]]]  # of a whole model: all that wrap it are known
        if len(candidates) > 1:
            raise ValueError(
                f"{what} has {name}, which may be {' or '.join(candidates)} here; give the names "
                "that are used here."
            )
        found[name] = candidates[0]
    for name, count in Counter(found.values()).items():
        if count > 1:
            both = " and ".join(n for n in given if found[n] == name)
            raise ValueError(f"{what} has {both}, which are both {name} here; give one of them.")
    return found


def _without(name: str, *components: str) -> str:
    """The name of a parameter without these components; its last one is its own."""
    *path, last = name.split(".")
    return ".".join([*(part for part in path if part not in components), last])
