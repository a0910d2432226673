"""Triton kernels, one op a file: they serve CUDA tensors with no compiler installed.

Triton takes long to import: a file is imported when one of its operators first runs. Each defines functions of the
operators' names, which check nothing (`ops/` does), make their outputs with torch and launch on the current stream.
Launches say whether a product and a sum may become one operation, because Triton's default is changing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

#: Each file and the operators that it serves.
OPERATORS: dict[str, tuple[str, ...]] = {
    "coalition_sizes": ("coalition_sizes",),
    "coalition_sum": ("coalition_sum", "coalition_sum_backward"),
    "exact_shapley": ("exact_shapley",),
    "layer_norm_segment_sum": ("layer_norm_segment_sum", "layer_norm_segment_sum_backward"),
    "linear_shapley_loss": ("linear_shapley_errors", "linear_shapley_errors_backward"),
    "mask_patches": ("mask_patches", "mask_patches_backward"),
    "pack_tokens": ("pack_tokens", "pack_tokens_backward"),
    "packed_attention": ("packed_attention", "packed_attention_backward"),
    "sample_coalitions": ("sample_coalitions",),
    "segment_sum": ("segment_sum", "segment_sum_backward"),
    "shapley_regression_loss": ("shapley_regression_loss", "shapley_regression_loss_backward"),
}


def _register(file: str, operator: str) -> None:
    def run(first: torch.Tensor, *arguments: Any) -> Any:
        kernel = getattr(import_module(f"{__name__}.{file}"), operator)
        # Triton launches on the current device, wherever the tensors are; on the CPU this does nothing.
        with torch.cuda.device_of(first):
            return kernel(first, *arguments)

    # CPU tensors come here in Triton's interpreter only: `_backend` sees to that.
    torch.library.impl(f"fastshap_triton::{operator}", ("cuda", "cpu"), run)


for _file, _operators in OPERATORS.items():
    for _operator in _operators:
        _register(_file, _operator)
