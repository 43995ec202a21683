"""Arrays in a pickle, without what makes pickles dangerous: nothing that a file names is called.

A pickle names functions, and says what they are called with. Three names are known here, those of
which NumPy makes an array of bytes, and they stand for code of ours. Any other name ends it.
"""

import io
import math
import pickle
from typing import Any

import numpy as np


def arrays_of(content: bytes) -> Any:
    """The dicts, lists, numbers, bytes and arrays of bytes in a pickle. Old strings are bytes.

    Raises:
        ValueError: it holds anything else, or is no whole pickle; one sentence says what.
    """
    try:
        return _done(_Arrays(io.BytesIO(content), encoding="bytes").load())
    except ValueError:
        raise
    except Exception as error:  # pickle raises whatever a broken file leads it to
        raise ValueError(f"it is no pickle of arrays ({type(error).__name__})") from error


class _Array:
    """An array of bytes that is still to be filled, by the state which NumPy gives to its own."""

    value: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        match state:
            case (1, tuple(shape), _Bytes(), False, bytes(raw)) if all(
                type(n) is int and n >= 0 for n in shape
            ) and math.prod(shape) == len(raw):
                self.value = np.frombuffer(raw, np.uint8).reshape(shape)
            case _:
                raise ValueError("it holds an array that is not one of bytes")


class _Bytes:
    """The dtype of bytes."""

    def __setstate__(self, state: Any) -> None:
        pass  # alignment and byte order, of which bytes have none


def _reconstruct(kind: Any, shape: Any, typecode: Any) -> _Array:
    if kind is not _Array:
        raise ValueError("it holds an array of an unknown class")
    return _Array()


def _dtype(name: Any, align: Any = False, copy: Any = False) -> _Bytes:
    if name not in (b"u1", "u1"):
        raise ValueError(f"it holds an array of dtype {name!r}, not one of bytes")
    return _Bytes()


KNOWN = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _dtype,
}


class _Arrays(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in KNOWN:
            raise ValueError(f"it asks for {module}.{name}, which is not run")
        return KNOWN[module, name]


def _done(found: Any) -> Any:
    """With arrays in place of those that were filled: of a dict, which is what files hold."""
    if not isinstance(found, dict):
        return found
    return {k: v.value if isinstance(v, _Array) else v for k, v in found.items()}
