"""What an op can't do without on any device: the bytes and FLOPs of a row."""

from __future__ import annotations

import fastshap_kernels as fk
from bench.lib.rows import Row
from fastshap_kernels.testing import Case


def floors(row: Row, case: Case) -> dict[str, tuple[float, float]]:
    """mode → (bytes, FLOPs): every input read once and every output written once, products of present tokens."""
    t, s, item = case.tensors, row.sizes, row.dtype.itemsize
    sums = s["batch"] * s.get("coalitions", 0) * s.get("width", 0) * item
    if row.op == "mask_patches":
        images, coalitions = t["images"].nbytes, s["coalitions"]
        share = fk.unpack_bits(t["bits"], s["grid"][0] * s["grid"][1]).double().mean().item()
        # The gradient of an absent patch is not read.
        return _modes(images * (1 + coalitions), images * (1 + share * coalitions))
    if row.op == "pack_tokens":
        moved = t["tokens"].nbytes + sums // 2 * (s["players"] + 2 * s["prefix"])
        return _modes(moved, moved)
    if row.op in ("segment_sum", "layer_norm_segment_sum"):
        rows = t["rows"].nbytes
        return _modes(rows + sums, (2 if row.op.startswith("layer") else 1) * rows + sums)
    if row.op == "coalition_sizes":
        return {"forward": (t["bits"].nbytes + 4 * s["batch"] * s["coalitions"], 0.0)}
    if row.op == "coalition_sum":
        moved = t["features"].nbytes + sums
        return _modes(moved, moved)
    if row.op == "shapley_regression_loss":
        moved = t["phi"].nbytes + t["values"].nbytes
        return _modes(moved, moved)
    if row.op == "linear_shapley_loss":
        flops = 2 * sums // item * s["classes"]
        moved = t["features"].nbytes + t["weight"].nbytes + t["values"].nbytes
        # Backward, the features are not needed again, their sums are; all three are smaller than what is written.
        return _modes(moved, moved + t["weight"].nbytes, flops, 2 * flops)
    if row.op == "packed_attention":
        pairs = float(t["cu_seqlens"].diff().double().square().sum())
        flops = 4 * pairs * s["heads"] * s["head_dim"]
        return _modes(t["qkv"].nbytes * 4 / 3, t["qkv"].nbytes * 7 / 3, flops, 2.5 * flops)
    if row.op == "exact_shapley":
        moved = t["values"].nbytes + s["batch"] * s["players"] * s["classes"] * item
        return _modes(moved, moved)
    return {}


def _modes(
    forward: float, backward: float, forward_flops: float = 0.0, backward_flops: float = 0.0
) -> dict[str, tuple[float, float]]:
    one, other = (forward, forward_flops), (backward, backward_flops)
    return {"forward": one, "backward": other, "both": (one[0] + other[0], one[1] + other[1])}
