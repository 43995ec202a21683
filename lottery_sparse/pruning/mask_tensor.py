"""MaskTensor: a buffer of bits that averages of models keep whole.

Averages of models do arithmetic with all buffers. The average of two masks means nothing; an
average should have the mask of the model that changed it last. So arithmetic between masks and
numbers gives its plain value, and the value remembers the masks in it. Writing such a value into a
mask writes the newest of these masks.

    ema.weight_mask.copy_(0.9 * ema.weight_mask + 0.1 * model.weight_mask)   # the model's mask

In all other calls a MaskTensor is a plain tensor, and its results are.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from lottery_sparse.ops.common.torch_private import (
    foreach_add_,
    foreach_addcdiv_,
    foreach_sub,
    without_torch_function,
)

_changes = itertools.count(1)


class Age:
    """When a mask was chosen, and who wants to know of writes to it; all views of it share one.

    Attributes:
        number: of the change that made the mask; copies have the same.
        readers: their `mask_is_written(mask, source)` is called before the mask takes that of
            `source`, and with None after any other write.
    """

    __slots__ = "number", "readers"

    def __init__(self, number: int | None = None):
        self.number = next(_changes) if number is None else number
        self.readers: WeakSet[Any] = WeakSet()


class MaskTensor(Tensor):
    """A tensor of bits, bool or packed, that knows when they were chosen.

    `plain` is the same tensor of torch's own type, an attribute so that graphs of torch.compile
    take it instead.
    """

    age: Age
    plain: Tensor

    @staticmethod
    def of(mask: Tensor, age: Age | None = None) -> MaskTensor:
        """A view of the mask; a mask chosen now, if `age` is not given."""
        if isinstance(mask, MaskTensor):
            return mask
        new = mask.as_subclass(MaskTensor)
        new.plain = mask if type(mask) is Tensor else mask.as_subclass(Tensor)
        new.age = Age() if age is None else age
        return new

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        rule = _RULES.get(func)
        if rule is not None:
            result = rule(func, *args, **kwargs)
            if result is not NotImplemented:
                return result
        result = _plain(func, args, kwargs)
        first = args[0] if args else None
        if isinstance(first, MaskTensor):
            if func in _STAY_MASKS and result.dtype == first.dtype:
                copied = func in _COPIES or not _shares_memory(result, first)
                return MaskTensor.of(result, Age(first.age.number) if copied else first.age)
            if result is first or func is Tensor.__setitem__:  # written in place
                first.age.number = next(_changes)
                _tell(first, None)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> MaskTensor:
        if id(self) not in memo:
            memo[id(self)] = self.clone()
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Files hold a plain bool tensor."""
        return plain(self).__reduce_ex__(protocol)


class _Blend(Tensor):
    """The result of arithmetic with masks, and the masks in it."""

    masks: list[MaskTensor]

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return MaskTensor.__torch_function__(func, types, args, kwargs)


def _shares_memory(a: Tensor, b: Tensor) -> bool:
    return a.device == b.device and not a.is_meta and plain(a).data_ptr() == plain(b).data_ptr()


def plain(tensor: Tensor) -> Tensor:
    """The same tensor, of torch's own type."""
    if isinstance(tensor, MaskTensor):
        return tensor.plain
    return tensor.as_subclass(Tensor) if isinstance(tensor, _Blend) else tensor


def mask_in(tensor: Tensor) -> Tensor | None:
    """The one mask in a result of arithmetic, plain; None: it has none, or several that differ."""
    if not isinstance(tensor, _Blend):
        return None
    first, *others = (plain(mask) for mask in tensor.masks)
    same = all(torch.equal(first, other) for other in others)
    return first if same else None


def _plain(func: Callable, args: Any, kwargs: Any) -> Any:
    with without_torch_function():
        return func(*args, **kwargs)


def _masks_in(operands: Iterable[Any]) -> list[MaskTensor]:
    """The masks in operands; none if one operand is neither a mask nor a number."""
    found: list[MaskTensor] = []
    for operand in operands:
        if isinstance(operand, MaskTensor):
            found.append(operand)
        elif isinstance(operand, _Blend):
            found += operand.masks
        elif isinstance(operand, Tensor) and operand.dim():
            return []
    return found


def _newest(masks: list[MaskTensor]) -> MaskTensor:
    return max(masks, key=lambda mask: mask.age.number)


def _tell(mask: MaskTensor, source: MaskTensor | None) -> None:
    for reader in list(mask.age.readers):
        reader.mask_is_written(mask, source)


def _copy(mask: MaskTensor, source: MaskTensor) -> None:
    if source.age.number != mask.age.number:
        _tell(mask, source)
    if source is not mask:
        _plain(Tensor.copy_, (mask, source), {})
        mask.age.number = source.age.number


# ---- what arithmetic does ------------------------------------------------------------------------


def _blend(func: Callable, *args: Any, **kwargs: Any) -> Any:
    """A new tensor with the plain value; differences, which bool lacks, are float32."""
    masks = _masks_in(args)
    if not masks:
        return NotImplemented
    if func in _SUBTRACTIONS:
        args = tuple(plain(a).float() if isinstance(a, MaskTensor) else a for a in args)
    result = _plain(func, args, kwargs).as_subclass(_Blend)
    result.masks = masks
    return result


def _take_newest(func: Callable, mask: Any, *args: Any, **kwargs: Any) -> Any:
    """Write the newest of the masks in place. Arithmetic with numbers alone changes nothing."""
    if not isinstance(mask, MaskTensor) or not (masks := _masks_in((mask, *args))):
        return NotImplemented
    _copy(mask, _newest(masks))
    return mask


def _copy_newest(func: Callable, mask: Any, source: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(mask, MaskTensor) or not isinstance(source, MaskTensor | _Blend):
        return NotImplemented
    _copy(mask, _newest(_masks_in([source])))
    return mask


def _blend_each(func: Callable, first: Any, second: Any, **kwargs: Any) -> Any:
    return [_blend(Tensor.sub, a, b) for a, b in zip(first, second, strict=True)]


def _take_newest_each(func: Callable, masks: Any, *lists: Any, **kwargs: Any) -> None:
    for i, mask in enumerate(masks):
        args = [each[i] if isinstance(each, list | tuple) else each for each in lists]
        _take_newest(func, mask, *args)


_SUBTRACTIONS = {
    torch.sub, torch.subtract, Tensor.sub, Tensor.subtract, Tensor.__sub__, Tensor.__rsub__,
}  # fmt: skip
_SUMS = {
    torch.add, torch.mul, torch.div, torch.true_divide, Tensor.add, Tensor.mul, Tensor.div,
    Tensor.true_divide, Tensor.__add__, Tensor.__radd__, Tensor.__mul__, Tensor.__rmul__,
    Tensor.__truediv__,
}  # fmt: skip
_IN_PLACE = {
    Tensor.mul_, Tensor.add_, Tensor.sub_, Tensor.div_, Tensor.lerp_, Tensor.addcdiv_,
    Tensor.addcmul_, Tensor.__imul__, Tensor.__iadd__, Tensor.__isub__, Tensor.__itruediv__,
}  # fmt: skip
_RULES: dict[Any, Callable] = {
    **dict.fromkeys(_SUBTRACTIONS | _SUMS, _blend),
    **dict.fromkeys(_IN_PLACE, _take_newest),
    Tensor.copy_: _copy_newest,
    foreach_sub: _blend_each,
    foreach_add_: _take_newest_each,
    foreach_addcdiv_: _take_newest_each,
}
_COPIES = {torch.clone, Tensor.clone}
_STAY_MASKS = _COPIES | {
    torch.detach, Tensor.detach, Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.contiguous,
    Tensor.share_memory_, Tensor.pin_memory,
}  # fmt: skip
