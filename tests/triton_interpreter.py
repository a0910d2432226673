"""Makes Triton's interpreter treat bfloat16 as devices do: it cuts digits off, and multiplies bit patterns.

Arithmetic on bfloat16 itself stays wrong there: kernels widen to float32 as they load.
"""

import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_cast = InterpreterBuilder.cast_impl
_dot = InterpreterBuilder.create_dot


def _cast_and_round(self, src, dst_type):
    from_type, to_type = src.dtype.scalar, dst_type.scalar
    if to_type == tl.bfloat16 and from_type in (tl.float16, tl.float32, tl.float64):
        rounded = torch.from_numpy(src.data.copy()).bfloat16().view(torch.uint16).numpy()
        return TensorHandle(rounded, to_type)
    return _cast(self, src, dst_type)


def _dot_in_float32(self, a, b, *others):
    return _dot(self, _widen(self, a), _widen(self, b), *others)


def _widen(builder, operand):
    return _cast(builder, operand, tl.float32) if operand.dtype.scalar == tl.bfloat16 else operand


def install():
    InterpreterBuilder.cast_impl = _cast_and_round
    InterpreterBuilder.create_dot = _dot_in_float32
