"""Tests of the GPU kernels: on a GPU, or else in Triton's interpreter.

Without a GPU they need a process that starts with TRITON_INTERPRET=1: tests/ops/test_triton.py
starts one, and `TRITON_INTERPRET=1 pytest tests/ops/triton` is another. Others do not collect them.
"""

from __future__ import annotations

import os

import numpy as np
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton.language as tl
    from triton.runtime import interpreter

    # min(3, NaN) is 3 on a GPU, but not yet in the interpreter of Triton 3.6
    interpreter.InterpreterBuilder.create_minnumf = lambda self, lhs, rhs: self.binary_op(
        lhs, rhs, np.fmin
    )
    patch = interpreter._patch_lang

    def patch_once(fn):
        """Each call of a device function patches the language again: a sixth of the time."""
        if tl.core.is_builtin(tl.load) or tl.core.is_builtin(tl.core.load):
            return patch(fn)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_once
elif torch.cuda.is_available():
    # float32 is compared with float64, and torch allows TF32 in convolutions unless told otherwise
    torch.backends.cudnn.conv.fp32_precision = "ieee"
else:
    collect_ignore_glob = ["test_*.py"]
