"""Ops for Shapley-value explanations of vision models: sampling, masking, packing, attention, losses, exact values."""

from ._backend import use_backend
from .ops.mask_patches import mask_patches
from .ops.pack_bits import pack_bits, unpack_bits

__version__ = "0.1.0"

__all__ = ["mask_patches", "pack_bits", "unpack_bits", "use_backend"]
