"""Where the Parameters of a step lie, as a table of numbers that kernels read: those of
Triton and of CUDA C++ (csrc/optim/cuda_optim.h).

int64: the first chunk of each part, and the number of chunks; a row for each part, a Parameter or
one network of a compact one; a row for each target, an effective weight; pointers of step counts.

    part     pointers of value, gradient and two states; size; elements that its first chunk begins
             early, so that chunks begin on 16 bytes, or -1 if its pointers do not allow it;
             position of the Parameter; first and last target
    target   pointers of the dense weight (0: none), starts and columns; rows; columns of a row;
             4 · wide + kind of the dense weight
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lottery_sparse.ops.common.torch_private import foreach_add_

CHUNK = 1024  # elements of a program
PART, TARGET = 9, 6  # numbers of a row
KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_MOST = 64  # tables that are held for steps to come


@dataclass(frozen=True)
class Targets:
    """Effective weights and the lists of their compact Parameters, as an op gets them."""

    dense: list[Tensor]  # [.., N, K], or without elements: not written
    starts: list[Tensor]
    columns: list[Tensor]
    owners: list[int]  # positions of the Parameters

    def of(self, parameters: list[int]) -> Targets:
        """Those of some Parameters, by position."""
        place = {p: i for i, p in enumerate(parameters)}
        mine = [t for t, owner in enumerate(self.owners) if owner in place]
        dense, starts, columns = (
            [held[t] for t in mine] for held in (self.dense, self.starts, self.columns)
        )
        return Targets(dense, starts, columns, [place[self.owners[t]] for t in mine])


@dataclass(frozen=True)
class Table:
    numbers: Tensor
    parts: int
    targets: int  # where they begin
    steps: int  # where the pointers of step counts begin
    chunks: int
    factors: Tensor  # float32, two for each step count: what a launch leaves for the next one

    @property
    def has_targets(self) -> bool:
        return self.targets < self.steps


_tables: OrderedDict[tuple, Table] = OrderedDict()


def table_of(tensors: Sequence[list[Tensor]], steps: list[Tensor], targets: Targets) -> Table:
    """The table for (params, grads, *states), an earlier one if nothing has moved since."""
    params, device = tensors[0], tensors[0][0].device
    stream, capturing = 0, False
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device).cuda_stream
        capturing = torch.cuda.is_current_stream_capturing()
    lists = (*tensors, steps, targets.dense, targets.starts, targets.columns)
    key = (
        device, stream, params[0].dtype, len(tensors), *targets.owners,
        *(t.data_ptr() for held in lists for t in held),
        *(p.shape for p in params), *(t.shape for t in targets.dense),
        *(t.dtype for t in targets.dense), *(t.shape for t in targets.starts),
    )  # fmt: skip
    found = None if capturing else _tables.get(key)
    if found is not None:
        _tables.move_to_end(key)
        return found
    found = _build(tensors, steps, targets, capturing)
    if not capturing:
        _tables[key] = found
        if len(_tables) > _MOST:
            _tables.popitem(last=False)
    return found


def _build(
    tensors: Sequence[list[Tensor]], steps: list[Tensor], targets: Targets, capturing: bool
) -> Table:
    first_chunks, parts, rows, chunks = [], [], [], 0
    for p, parameter in enumerate(tensors[0]):
        mine = [t for t, owner in enumerate(targets.owners) if owner == p]
        networks = _networks(targets.starts[mine[0]]) if mine else 1
        size, width = parameter.numel() // max(networks, 1), parameter.element_size()
        if size == 0:
            continue
        for e in range(networks):
            pointers = [held[p].data_ptr() + e * size * width for held in tensors]
            beyond = {pointer % 16 for pointer in pointers}
            shift = beyond.pop() // width if len(beyond) == 1 else -1
            first = len(rows) // TARGET
            for t in mine:
                rows += _target(targets.dense[t], targets.starts[t], targets.columns[t], e)
            pointers += [0] * (4 - len(pointers))
            parts += [*pointers, size, shift, p, first, len(rows) // TARGET]
            first_chunks.append(chunks)
            chunks += -(-(size + max(shift, 0)) // CHUNK)
    count = len(first_chunks)
    numbers = [*first_chunks, chunks, *parts, *rows, *(t.data_ptr() for t in steps)]
    begin = count + 1 + len(parts)
    factors = torch.empty(2 * len(steps), dtype=torch.float32, device=tensors[0][0].device)
    held = _upload(numbers, factors.device, capturing)
    return Table(held, count, begin, begin + len(rows), chunks, factors)


def _networks(starts: Tensor) -> int:
    return starts.numel() // starts.shape[-1]


def _target(dense: Tensor, starts: Tensor, columns: Tensor, e: int) -> list[int]:
    rows = starts.shape[-1] - 1
    one = dense.numel() // _networks(starts)
    return [
        dense.data_ptr() + e * one * dense.element_size() if one else 0,
        starts.data_ptr() + e * (rows + 1) * starts.element_size(),
        columns.data_ptr() + e * columns.shape[-1] * columns.element_size(),
        rows,
        one // max(rows, 1),
        4 * (columns.dtype == torch.int32) + KINDS[dense.dtype],
    ]


def _upload(numbers: list[int], device: torch.device, capturing: bool) -> Tensor:
    """Onto the device without waiting for it.

    A captured graph writes its table at each replay. A copy from the host would read memory that
    must be pinned, which a capture cannot do, and must live as long as the graph, which nobody
    tells us. So the numbers go as arguments of kernels, some hundred to a launch: the graph itself
    holds these, any number of them, and they end with it.
    """
    if capturing:
        held = torch.zeros(len(numbers), dtype=torch.int64, device=device)
        foreach_add_(held.unbind(), numbers)
        return held
    values = torch.tensor(numbers, dtype=torch.int64)
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def refused(
    tensors: Sequence[list[Tensor]], steps: list[Tensor], targets: Targets, lr: float | Tensor
) -> int:
    """The position of the first Parameter whose tensors the kernels do not take, or -1."""
    device, dtype = tensors[0][0].device, tensors[0][0].dtype
    if isinstance(lr, Tensor) and (lr.device != device or lr.dtype != torch.float32):
        return 0
    for p, parameter in enumerate(tensors[0]):
        for held in tensors:
            t = held[p]
            if (
                t.layout != torch.strided
                or t.dtype != dtype
                or t.device != device
                or t.shape != parameter.shape
                or not t.is_contiguous()
            ):
                return p
        if steps and (steps[p].dtype != torch.float32 or steps[p].device != steps[0].device):
            return p
    lists = zip(targets.dense, targets.starts, targets.columns, targets.owners, strict=True)
    for dense, starts, columns, owner in lists:
        if not (
            (dense.numel() == 0 or dense.device == device)
            and starts.device == columns.device == device
            and dense.dtype in KINDS
            and starts.dtype == torch.int64
            and columns.dtype in (torch.int16, torch.int32)
            and all(t.is_contiguous() for t in (dense, starts, columns))
            and columns.shape == tensors[0][owner].shape
        ):
            return owner
    return -1


# ---- Adam's step counts --------------------------------------------------------------------------


def on_device(steps: list[Tensor], params: list[Tensor]) -> bool:
    """Whether step counts lie beside the Parameters, as with `capturable` and `fused`."""
    return steps[0].device == params[0].device


def tables_by_count(
    tensors: tuple[list[Tensor], ...], steps: list[Tensor], targets: Targets
) -> list[tuple[Table, list[Tensor], float]]:
    """For counts on the host: a table, the counts, and their value, of all with as many steps.

    All tables come before the first launch: they take memory, and a step is taken whole or not.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """
    params = tensors[0]
    if params[0].is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "Adam's step counts are on the host, which a captured graph would not count; use "
            "capturable=True or fused=True, and take a step before the capture."
        )
    taken = [step.item() for step in steps]
    found = []
    for count in sorted(set(taken)):
        mine = [i for i, c in enumerate(taken) if c == count]
        some, to = tensors, targets
        if len(mine) < len(params):
            some, to = tuple([held[p] for p in mine] for held in tensors), targets.of(mine)
        found.append((table_of(some, [], to), [steps[i] for i in mine], count))
    return found


def log_of(beta: float) -> float:
    """ln beta, -inf for 0."""
    return math.log(beta) if beta > 0 else -math.inf
