import pytest
import torch
from torch.nn import functional

import fastshap_vision as fv
from fastshap_vision._runtime.onednn_linear import FEWEST_ROWS, CpuLinear, cpu_linears


@pytest.fixture
def served(monkeypatch):
    """The shapes that ran through oneDNN."""
    shapes = []
    apply = CpuLinear.apply

    def spy(input, weight, bias):
        shapes.append(tuple(input.shape))
        return apply(input, weight, bias)

    monkeypatch.setattr(CpuLinear, "apply", spy)
    return shapes


def gradients(input, weight, bias, cotangent):
    leaves = [x.clone().requires_grad_() for x in (input, weight, bias) if x is not None]
    out = functional.linear(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]


@pytest.mark.parametrize("leading", [(FEWEST_ROWS,), (2 * FEWEST_ROWS - 7,), (8, 67)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_equals_the_plain_layer(generator, served, leading, has_bias):
    input, weight = torch.randn(*leading, 24, generator=generator), torch.randn(40, 24, generator=generator)
    bias = torch.randn(40, generator=generator) if has_bias else None
    cotangent = torch.randn(*leading, 40, generator=generator)
    with cpu_linears(input):
        ours = gradients(input, weight, bias, cotangent)
    assert served == [(*leading, 24)]
    plain = gradients(input, weight, bias, cotangent)
    exact = gradients(*(x if x is None else x.double() for x in (input, weight, bias, cotangent)))
    for x, y, truth in zip(ours, plain, exact, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert (x - truth).norm() <= 2 * (y - truth).norm() + torch.finfo(x.dtype).eps * truth.norm()


@pytest.mark.parametrize(
    ("input", "weight"),
    [
        (torch.ones(200, 8, dtype=torch.float64), torch.ones(4, 8, dtype=torch.float64)),
        (torch.ones(200, 8, dtype=torch.bfloat16), torch.ones(4, 8, dtype=torch.bfloat16)),
        (torch.ones(FEWEST_ROWS - 1, 8), torch.ones(4, 8)),
        (torch.ones(FEWEST_ROWS, 8), torch.ones(0, 8)),
        (torch.ones(200, 0), torch.ones(4, 0)),
        (torch.ones(200, 8, device="meta"), torch.ones(4, 8, device="meta")),
    ],
)
def test_other_layers_stay_as_they_are(served, input, weight):
    with cpu_linears(input):
        assert functional.linear(input, weight).shape == (input.shape[0], weight.shape[0])
    assert served == []


class Halved(torch.Tensor):
    """Products with it are half as large, whatever library they run in."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs or {})
        return 0.5 * out.as_subclass(torch.Tensor) if func is functional.linear else out


def test_tensors_of_other_kinds_keep_their_own_products(served):
    input = torch.ones(FEWEST_ROWS, 8)
    with cpu_linears(input):
        assert functional.linear(input, torch.ones(4, 8).as_subclass(Halved)).eq(4.0).all()
        assert functional.linear(input.as_subclass(Halved), torch.ones(4, 8)).eq(4.0).all()
    assert served == []


def test_other_shapes_stay_as_they_are(served):
    """A vector as a weight is the plain layer's to take, and a wrong width its to refuse."""
    input = torch.ones(FEWEST_ROWS, 8)
    with cpu_linears(input):
        assert functional.linear(input, torch.ones(8)).shape == (FEWEST_ROWS,)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            functional.linear(input, torch.ones(4, 7))
    assert served == []


def test_autocast_stays_as_it_is(served):
    with torch.autocast("cpu", torch.bfloat16), cpu_linears(torch.ones(1)):
        assert functional.linear(torch.ones(FEWEST_ROWS, 8), torch.ones(4, 8)).dtype == torch.bfloat16
    assert served == []


def test_a_second_derivative_is_an_error():
    x, weight = torch.randn(FEWEST_ROWS, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    with cpu_linears(x):
        (gradient,) = torch.autograd.grad(functional.linear(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_the_packed_pass_uses_it(served, generator):
    model = fv.SelfExplainingClassifier(
        "vit_tiny_patch16_224", 5, img_size=64, model_kwargs={"embed_dim": 32, "depth": 2, "num_heads": 2}
    )
    images = torch.randn(32, 3, 64, 64, generator=generator)
    bits = torch.full((32, 4, 1), 0x5555, dtype=torch.int32)
    model.game.values(images, fv.Coalitions(bits, model.players))
    rows = 32 * 4 * 9
    assert (32, 17, 32) in served  # the first block's queries, keys and values, once per image
    assert (rows, 32) in served
