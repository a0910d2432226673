import pytest
import torch
from torch.nn import functional

from fastshap_vision._runtime.onednn_linear import cpu_linears

WIDTH = 384


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [(WIDTH, 3 * WIDTH), pytest.param(WIDTH, WIDTH, marks=pytest.mark.short), (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)],
)
def test_cpu_linear(pair, inputs, outputs):
    rows = torch.randn(2376, inputs, requires_grad=True)  # a packed joint batch of ViT-S/16: B 4, M 4
    weight, bias = torch.randn(outputs, inputs, requires_grad=True), torch.randn(outputs, requires_grad=True)
    cotangent = torch.randn(2376, outputs)

    def plain():
        return torch.autograd.grad(functional.linear(rows, weight, bias), (rows, weight, bias), cotangent)

    def ours():
        with cpu_linears(rows):
            return plain()

    shape = f"{inputs} to {outputs}, 2376 rows, float32, forward + backward"
    pair("cpu_linears", shape, "the BLAS of PyTorch", ours, plain)
