"""Ops for Shapley-value explanations of vision models: sampling, masking, packing, attention, losses, exact values.

Every op is deterministic, forward and backward: the same call of one backend on one device gives the same bits.

Example, whose names all other examples use:
    >>> import torch
    >>> import fastshap_kernels as fk
    >>> fk.sample_coalitions(batch=2, coalitions=4, players=9, seed=0).shape
    torch.Size([2, 4, 1])
"""

from . import triton as _triton  # noqa: F401 (registers its operators)
from ._backend import use_backend
from .ops.coalition_sizes import coalition_sizes
from .ops.coalition_sum import coalition_sum
from .ops.exact_shapley import exact_shapley
from .ops.kernel_shap import KernelShapEstimate, kernel_shap
from .ops.layer_norm_segment_sum import layer_norm_segment_sum
from .ops.linear_shapley_loss import linear_shapley_loss
from .ops.mask_patches import mask_patches
from .ops.pack_bits import pack_bits, unpack_bits
from .ops.pack_tokens import pack_tokens
from .ops.packed_attention import packed_attention
from .ops.sample_coalitions import sample_coalitions
from .ops.segment_sum import segment_sum
from .ops.shapley_regression_loss import shapley_regression_loss

__version__ = "0.1.0"

__all__ = [
    "KernelShapEstimate",
    "coalition_sizes",
    "coalition_sum",
    "exact_shapley",
    "kernel_shap",
    "layer_norm_segment_sum",
    "linear_shapley_loss",
    "mask_patches",
    "pack_bits",
    "pack_tokens",
    "packed_attention",
    "sample_coalitions",
    "segment_sum",
    "shapley_regression_loss",
    "unpack_bits",
    "use_backend",
]
