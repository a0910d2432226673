"""Makes Triton's interpreter round to bfloat16 as devices do: to nearest, where it cuts digits off."""

import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_cast = InterpreterBuilder.cast_impl


def _cast_and_round(self, src, dst_type):
    from_type, to_type = src.dtype.scalar, dst_type.scalar
    if to_type == tl.bfloat16 and from_type in (tl.float16, tl.float32, tl.float64):
        rounded = torch.from_numpy(src.data.copy()).bfloat16().view(torch.uint16).numpy()
        return TensorHandle(rounded, to_type)
    return _cast(self, src, dst_type)


def install():
    InterpreterBuilder.cast_impl = _cast_and_round
