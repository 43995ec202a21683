"""The CUDA kernels for training, emulated: the ops of csrc/bindings_cuda_*.cpp on the CPU."""

from __future__ import annotations

import ctypes

import cuda_emulator as emulator
import torch
from cuda_emulator import NUMBERS, pointer
from torch import Tensor

WORD, POINTER, NUMBER, FLAG = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int, ctypes.c_bool
FLOAT, DOUBLE = ctypes.c_float, ctypes.c_double


def struct(name: str, **fields: type) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


Pack = struct(
    "Pack", networks=WORD, batch=WORD, in_features=WORD, x=POINTER, panels=POINTER, type=NUMBER,
    lists=WORD, slots=WORD, ends=WORD, starts=POINTER, positions=POINTER, values=POINTER,
    ordered=POINTER,
)  # fmt: skip
Kept = struct("Kept", starts=POINTER, columns=POINTER, slots=WORD, wide=FLAG)
Compact = struct(
    "Compact", networks=WORD, batch=WORD, in_features=WORD, out_features=WORD, shared_x=FLAG,
    type=NUMBER, kept=Kept, panels=POINTER, values=POINTER, bias=POINTER, y=POINTER, chunk=WORD,
)  # fmt: skip
Dvalues = struct(
    "Dvalues", networks=WORD, batch=WORD, in_features=WORD, out_features=WORD, shared_x=FLAG,
    type=NUMBER, kept=Kept, panels=POINTER, dy_panels=POINTER, partial=POINTER, dvalues=POINTER,
    chunk=WORD, rows=WORD,
)  # fmt: skip
Scatter = struct(
    "Scatter", networks=WORD, rows=WORD, row_length=WORD, kept=Kept, values=POINTER, dense=POINTER,
    values_type=NUMBER, dense_type=NUMBER,
)  # fmt: skip
Step = struct(
    "Step", table=POINTER, targets=POINTER, parts=WORD, chunks=WORD, type=NUMBER, lr=POINTER,
    rate=FLOAT,
)  # fmt: skip
Sgd = struct(
    "Sgd", step=Step, momentum=FLOAT, undamped=FLOAT, weight_decay=FLOAT, states=FLAG, first=FLAG,
    nesterov=FLAG, maximize=FLAG,
)  # fmt: skip
Adam = struct(
    "Adam", step=Step, factors=POINTER, step_size=FLOAT, second_scale=FLOAT, beta1_rest=FLOAT,
    beta2=FLOAT, beta2_rest=FLOAT, eps=FLOAT, weight_decay=FLOAT, decoupled=FLAG, maximize=FLAG,
)  # fmt: skip
Count = struct(
    "Count", steps=POINTER, count=WORD, lr=POINTER, rate=DOUBLE, log_beta1=DOUBLE,
    log_beta2=DOUBLE, factors=POINTER,
)  # fmt: skip

Bits = struct("Bits", rows=WORD, columns=WORD, words=WORD, mask=POINTER, bits=POINTER)


class Rim:
    """The ops, on a device of so many multiprocessors with so much shared memory."""

    def __init__(self, processors: int = 2, shared: int = emulator.SHARED) -> None:
        self.device = processors, shared

    def pack_panels(self, x: Tensor) -> Tensor:
        return self._pack(x, Pack())

    def _pack(self, x: Tensor, p: ctypes.Structure) -> Tensor:
        p.networks, p.type = networks_of(x, 2), NUMBERS[x.dtype]
        p.batch, p.in_features = x.shape[-2:]
        rows = 128 // x.element_size()
        packed = torch.full((p.networks, -(-p.batch // rows), p.in_features, rows), torch.nan)
        packed = packed.to(x.dtype)
        p.x, p.panels = pointer(x), pointer(packed)
        check(emulator.library().ls_emulate_compact_pack(ctypes.byref(p)))
        return packed

    def _product(self, packed, values, starts, columns, bias, batch, apart) -> Tensor:
        networks, rows = networks_of(values, 1), starts.shape[-1] - 1
        y = torch.full((networks, batch, rows), torch.nan).to(values.dtype)
        p = Compact(
            networks, batch, packed.shape[2], rows, len(packed) == 1, NUMBERS[values.dtype],
            kept_of(starts, columns), pointer(packed), pointer(values), pointer(bias), pointer(y),
        )  # fmt: skip
        emulator.readable(packed)
        check(emulator.library().ls_emulate_compact_linear(ctypes.byref(p), *self.device))
        return y if apart else y[0]

    def compact_linear(self, x, values, starts, columns, bias):
        packed = self.pack_panels(x.contiguous())
        y = self._product(packed, values, starts, columns, bias, x.shape[-2], values.dim() == 2)
        return y, packed

    def compact_linear_backward(
        self, dy, packed_x, values, starts, columns, column_starts, rows, positions, shared_x,
        need_dx, need_dvalues,
    ):  # fmt: skip
        networks, dx, dv = networks_of(values, 1), dy.new_empty(0), dy.new_empty(0)
        p, ordered = Pack(), torch.full_like(values, torch.nan)
        if need_dx:
            p.lists, p.slots, p.ends = networks, values.shape[-1], starts.shape[-1]
            p.starts, p.positions = pointer(starts), pointer(positions)
            p.values, p.ordered = pointer(values), pointer(ordered)
        packed_dy = self._pack(dy.contiguous(), p)
        if need_dx:
            lists = column_starts, rows
            dx = self._product(packed_dy, ordered, *lists, None, dy.shape[-2], values.dim() == 2)
        if need_dvalues:
            dv = torch.full_like(values, torch.nan)
            partial = torch.full((packed_dy.shape[1], *values.shape), torch.nan)
            d = Dvalues(
                networks, dy.shape[-2], packed_x.shape[2], dy.shape[-1], shared_x,
                NUMBERS[dy.dtype], kept_of(starts, columns), pointer(packed_x), pointer(packed_dy),
                pointer(partial), pointer(dv),
            )  # fmt: skip
            emulator.readable(packed_x)
            check(emulator.library().ls_emulate_compact_dvalues(ctypes.byref(d), *self.device))
        return dx, dv

    def scatter_kept_(self, dense, values, starts, columns):
        networks, rows = networks_of(values, 1), starts.shape[-1] - 1
        if dense.numel():
            p = Scatter(
                networks, rows, dense.numel() // (networks * rows), kept_of(starts, columns),
                pointer(values), pointer(dense), NUMBERS[values.dtype], NUMBERS[dense.dtype],
            )  # fmt: skip
            check(emulator.library().ls_emulate_scatter_kept(ctypes.byref(p)))

    def sgd_step(
        self, table, like, parts, targets, chunks, lr, rate, momentum, dampening, weight_decay,
        nesterov, maximize, states, first,
    ):  # fmt: skip
        step = step_of(table, like, parts, targets, chunks, lr, rate)
        p = Sgd(step, momentum, 1 - dampening, weight_decay, states, first, nesterov, maximize)
        check(emulator.library().ls_emulate_sgd_step(ctypes.byref(p)))

    def adam_step(
        self, table, like, parts, targets, chunks, lr, rate, factors, step_size, second_scale,
        beta1, beta2, eps, weight_decay, decoupled, maximize,
    ):  # fmt: skip
        step = step_of(table, like, parts, targets, chunks, lr, rate)
        p = Adam(
            step, pointer(factors), step_size, second_scale, 1 - beta1, beta2, 1 - beta2, eps,
            weight_decay, decoupled, maximize,
        )  # fmt: skip
        check(emulator.library().ls_emulate_adam_step(ctypes.byref(p)))

    def count_steps(self, table, begin, count, lr, rate, log_beta1, log_beta2):
        factors = torch.full((count, 2), torch.nan)
        steps = table.data_ptr() + 8 * begin
        p = Count(steps, count, pointer(lr), rate, log_beta1, log_beta2, pointer(factors))
        check(emulator.library().ls_emulate_count_steps(ctypes.byref(p)))
        return factors

    def pack_mask(self, mask):
        mask = mask.contiguous()
        bits = torch.full((len(mask), -(-mask.shape[1] // 128) * 4), -1, dtype=torch.int32)
        return self._move_bits(mask, bits, True)[1]

    def unpack_mask(self, bits, columns):
        mask = torch.full((len(bits), columns), 7, dtype=torch.uint8)
        return self._move_bits(mask, bits.contiguous(), False)[0].view(torch.bool)

    def _move_bits(self, mask, bits, pack):
        p = Bits(len(mask), mask.shape[1], bits.shape[1], pointer(mask), pointer(bits))
        emulator.readable(mask)
        check(emulator.library().ls_emulate_mask_bits(ctypes.byref(p), FLAG(pack)))
        return mask, bits


def step_of(table, like, parts, targets, chunks, lr, rate) -> ctypes.Structure:
    assert targets == parts * 10 + 1
    at = table.data_ptr()
    return Step(at, at + 8 * targets, parts, chunks, NUMBERS[like.dtype], pointer(lr), rate)


def networks_of(t: Tensor, dims: int) -> int:
    return len(t) if t.dim() > dims else 1


def kept_of(starts: Tensor, columns: Tensor) -> ctypes.Structure:
    wide = columns.dtype == torch.int32
    return Kept(pointer(starts), pointer(columns), columns.shape[-1], wide)


def check(fault: bytes | None) -> None:
    assert fault is None, fault.decode()
