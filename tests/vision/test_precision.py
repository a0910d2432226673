import pytest
import torch
from torch.nn.functional import cross_entropy
from vision_transformers import converted, images

import fastshap_kernels as fk
import fastshap_vision as fv
from fastshap_vision._runtime.precision import _check_float8, lowered, quantise

LABELS = torch.tensor([0, 3, 6])
#: Root mean square error of v(S) over its spread: bfloat16 keeps 8 bits of a number, e4m3 four.
LIMITS = {"same": 0.0, "auto": 0.0, "bf16": 0.02, "fp8": 0.15}


def model_images_bits(kind="class token"):
    model = converted(kind)
    return model, images(size=model.game.input_size[1]), fk.sample_coalitions(3, 8, model.players, seed=0)


def error(values, exact):
    return float((values.float() - exact).square().mean().sqrt() / exact.std())


@pytest.mark.parametrize("kind", ["class token", "average pooling", "query and key norm, pre-norm", "SigLIP"])
@torch.no_grad()
def test_each_precision_is_as_close_as_its_bits(kind):
    model, x, bits = model_images_bits(kind)
    exact = model.coalition_values(x, bits)
    errors = {}
    for precision in LIMITS:
        values = model.coalition_values(x, bits, precision=precision, max_rows=100)
        errors[precision] = error(values, exact)
    assert errors["same"] == errors["auto"] < 1e-5
    assert 1e-3 < errors["bf16"] < LIMITS["bf16"]
    assert 2 * errors["bf16"] < errors["fp8"] < LIMITS["fp8"]
    assert torch.equal(model.coalition_values(x, bits), exact)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@torch.no_grad()
def test_an_exception_leaves_the_model_as_it_was(precision):
    model, x, bits = model_images_bits()
    exact = model.coalition_values(x, bits)

    def interrupted():
        with lowered(model, precision):
            assert not torch.equal(model.coalition_values(x, bits), exact)
            raise KeyError("out")

    with pytest.raises(KeyError):
        interrupted()
    assert torch.equal(model.coalition_values(x, bits), exact)


def emulated(x, weight, bias):
    """What an 8-bit product computes: both operands rounded, exact products and sums."""
    rows, columns = quantise(x), quantise(weight)
    product = rows.values.double() @ columns.values.double().T
    return product * (rows.scale.double() * columns.scale.double()) + bias


@pytest.mark.parametrize("shape", [(16, 48), (3, 5, 48), (0, 48)])
@torch.no_grad()
def test_products_round_their_operands_and_nothing_else(shape, generator):
    """Only the linear layers of the blocks, and of them only those that fit."""
    model, _, _ = model_images_bits()
    layer, head = model.backbone.blocks[0].attn.qkv, model.backbone.head
    x = torch.randn(shape, generator=generator) * torch.logspace(-3, 3, 48)
    features = torch.randn(4, 48, generator=generator)
    with lowered(model, "bf16"):
        head_alone = head(features)
    with lowered(model, "fp8"):
        ours = layer(x)
        assert torch.equal(head(features), head_alone)
    assert ours.dtype == torch.bfloat16
    assert ours.shape == (*shape[:-1], 144)
    if x.numel():
        wanted = emulated(x.flatten(0, -2), layer.weight, layer.bias).view(ours.shape)
        assert (ours - wanted).abs().max() <= 2**-7 * wanted.abs().max()


def test_quantise_fills_the_range():
    x = torch.tensor([[-3.0, 0.5, 1e-6, 0.0]])
    quantised = quantise(x)
    assert quantised.values.dtype == torch.float8_e4m3fn
    assert quantised.values.float().tolist()[0][0] == -448
    assert torch.allclose(quantised.values.float() * quantised.scale, x, rtol=2**-4, atol=1e-5)
    assert quantise(torch.zeros(2, 2)).values.float().abs().sum() == 0
    assert quantise(torch.full((2, 2), 3e38)).values.float().isfinite().all()


@pytest.mark.parametrize("precision", LIMITS)
def test_detached_targets_run_lower(precision, monkeypatch):
    """And nothing else: task and features are the model's own, and gradients flow."""
    model, x, _ = model_images_bits()
    targets = {}
    inner = model.regression_loss

    def watch(features, logits, bits, values, *others):
        targets["values"], targets["features"] = values, features.last
        return inner(features, logits, bits, values, *others)

    monkeypatch.setattr(model, "regression_loss", watch)
    objective = fv.JointObjective(8, target_precision=precision, seed=0)
    terms = objective(model, x, LABELS)
    exact = model.coalition_values(x, fk.sample_coalitions(3, 8, model.players, seed=0)).detach()
    assert targets["values"].dtype == targets["features"].dtype == torch.float32
    assert LIMITS[precision] / 20 <= error(targets["values"], exact) <= LIMITS[precision] + 1e-6
    assert torch.equal(terms.task, cross_entropy(model(x), LABELS))
    terms.loss.backward()
    assert model.backbone.patch_embed.proj.weight.grad.abs().sum() > 0


def test_values_that_carry_gradient_keep_the_precision_of_the_task():
    model, x, _ = model_images_bits()
    losses = [
        fv.JointObjective(4, masked_task_weight=1, target_precision=precision)(model, x, LABELS).loss
        for precision in ("same", "fp8")
    ]
    assert torch.equal(*losses)


def test_compiled_values_run_lower_too():
    """In one graph, and to the precision asked."""
    torch._dynamo.reset()
    model, x, bits = model_images_bits()
    model.backbone.blocks = model.backbone.blocks[:1]

    @torch.no_grad()
    def values(precision):
        with lowered(model, precision):
            return model.game.values(x, fv.Coalitions(bits, model.players, paired=True)).float()

    exact, bf16 = values("same"), values("bf16")
    compiled = torch.compile(values, fullgraph=True, backend="aot_eager")("fp8")
    assert 2 * error(bf16, exact) < error(compiled, exact) < LIMITS["fp8"]


@torch.no_grad()
def test_auto_lowers_float32_models_on_a_gpu_only(monkeypatch):
    model, _, _ = model_images_bits()
    assert not isinstance(lowered(model, "auto"), torch.autocast)

    gpu = type("Device", (), {"type": "cuda"})()

    class Parameter:
        def __init__(self, dtype):
            self.dtype, self.device = dtype, gpu

    for dtype, autocast, is_lowered in (
        (torch.float32, False, True),
        (torch.float32, True, False),
        (torch.float16, False, False),
    ):
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind, on=autocast: on)
        monkeypatch.setattr(torch, "autocast", lambda kind, dtype: ("autocast", kind, dtype))
        model.parameters = lambda dtype=dtype: iter([Parameter(dtype)])
        assert (lowered(model, "auto") == ("autocast", "cuda", torch.bfloat16)) is is_lowered


def test_errors_name_the_remedy(monkeypatch):
    model, x, bits = model_images_bits()
    with pytest.raises(ValueError, match=r"no_grad.*bf16"):
        model.coalition_values(x, bits, precision="fp8")
    with pytest.raises(ValueError, match="`precision`"):
        lowered(model, "fp4")
    with pytest.raises(ValueError, match="`target_precision`"):
        fv.JointObjective(target_precision="fp4")
    convolutional, x, bits = model_images_bits("resnet18")
    with torch.no_grad(), pytest.raises(ValueError, match=r"transformers.*bf16"):
        convolutional.coalition_values(x, bits, precision="fp8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with torch.no_grad(), pytest.raises(ValueError, match=r"8\.9.*A100.*8\.0.*bf16"):
        _check_float8(torch.device("cuda", 0))
