import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from fastshap_vision._runtime.packed_sdpa import cpu_attention


@pytest.mark.parametrize(
    ("batch", "length", "heads", "head_dim"), [pytest.param(64, 64, 3, 32, marks=pytest.mark.short), (8, 196, 6, 64)]
)
def test_cpu_attention(pair, batch, length, heads, head_dim):
    shape = (batch, heads, length, head_dim)
    leaves = [torch.randn(shape).bfloat16().requires_grad_() for _ in range(3)]
    cotangent = torch.randn(shape).bfloat16()

    def plain():
        return torch.autograd.grad(scaled_dot_product_attention(*leaves), leaves, cotangent)

    def ours():
        with cpu_attention(cotangent):
            return plain()

    shape = f"B {batch}, {length} tokens, {heads} heads × {head_dim}, bfloat16, forward + backward"
    pair("cpu_attention", shape, "attention of PyTorch", ours, plain)
