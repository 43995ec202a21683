"""The private names of torch that this package uses, each with the reason.

A torch that renames one of them breaks here, and nowhere else. Attributes of modules that torch
documents as dicts in all but name (`_parameters`, `_buffers`) are not listed; csrc/linear/eager*
says for itself what it uses of torch's C++.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch.autograd import forward_ad as forward_ad  # its _current_level: is a tangent possible?
from torch.nn.modules import batchnorm
from torch.utils import checkpoint

_torch: Any = torch
_C: Any = _torch._C
_optimizer: Any = import_module("torch.optim.optimizer")  # torch.optim hides it

# ---- who watches a call, asked in every eager call of an op -------------------------------

# torch.func transforms; none of their public names tells that one is active
functorch_is_active = _C._are_functorch_transforms_active
# the number of active TorchDispatchModes
dispatch_modes = _C._len_torch_dispatch_stack
# a tensor that outlived its transform
is_functorch_wrapped = _C._functorch.is_functorch_wrapped_tensor
# a call of torch itself, without our __torch_function__
without_torch_function = _C.DisableTorchFunctionSubclass
# the base of an autograd.Function that torch.func never sees: its `apply` is C++ alone, without a
# Python call for each argument, which that of torch.autograd.Function makes for torch.func
EagerFunction: Any = _torch.autograd.function._SingleLevelFunction


def below(key: str) -> Any:
    """A context in which the dispatcher passes over a key, as torch's own autocast rules do."""
    return _C._ExcludeDispatchKeyGuard(_C.DispatchKeySet(getattr(_C.DispatchKey, key)))


# ---- backward, and what runs again in it ---------------------------------------------------------

# the number of the backward that runs, or -1
current_backward = _C._current_graph_task_id
# hooks of torch.utils.checkpoint; without it a layer looks for checkpointed calls each time
top_saved_tensors_hooks: Any = getattr(
    _C._autograd, "_top_saved_tensors_default_hooks", lambda _: ()
)
# whose frames hold the object of a checkpointed call
checkpoint_hook: Any = getattr(checkpoint, "_checkpoint_hook", None)

# ---- optimizers ----------------------------------------------------------------------------------

# a function that torch.compile does not trace; torch.compiler.disable imports the compiler
disable_dynamo: Any = _torch._disable_dynamo
# whether a profiler wants to know of a step; record_function takes 6 us, profiling or not
profiler_is_enabled: Any = _torch.autograd._profiler_enabled
# hooks on the steps of all optimizers: are there any but ours?
global_pre_hooks: dict[int, Any] = _optimizer._global_optimizer_pre_hooks
global_post_hooks: dict[int, Any] = _optimizer._global_optimizer_post_hooks
# the dtype of the step count, as torch's optimizers choose it
step_dtype: Any = _optimizer._get_scalar_dtype
# the base of all batch and instance norms
NormBase: Any = batchnorm._NormBase
# public in all but name: lists of tensors in one call
foreach_add_: Any = _torch._foreach_add_
foreach_sub: Any = _torch._foreach_sub
foreach_addcdiv_: Any = _torch._foreach_addcdiv_

# ---- memory and machines -------------------------------------------------------------------------

# how many tensors share a memory: whether a dense weight that was lent has readers
storage_uses = _C._storage_Use_Count


def multiplies_bfloat16() -> tuple[bool, bool]:
    """Whether this processor multiplies bfloat16 by vectors, and by tiles (AMX).

    torch.backends.cpu tells no more than the name of an instruction set.
    """
    return _torch.cpu._is_avx512_bf16_supported(), _torch.cpu._is_amx_tile_supported()


def cuda_driver() -> int:
    """The version of CUDA that the driver is for, 1000 major + 10 minor; on a CUDA build only."""
    return _C._cuda_getDriverVersion()
