from functools import partial

import pytest
import torch
from accuracy import BACKEND, BACKENDS, DTYPES, PLAYERS, assert_all_accurate, check_gradients, normal, random_bits
from dispatch import Operators

import fastshap_kernels as fk

REDUCTIONS = ("mean", "sum", "none")
NORMALIZATIONS = ("none", "additive")


def make_arguments(generator, batch=3, coalitions=5, players=33, width=67, classes=9, dtype=torch.float64):
    """features, weight, bias, bits, values, null, grand, weights."""

    random = partial(normal, generator, dtype=dtype)

    # A small weight: float16 holds the square of what 1025 players add up to.
    head = random(batch, players, width), 0.1 * random(classes, width), random(classes)
    bits = random_bits(batch, coalitions, players, generator)
    game = random(batch, coalitions, classes), random(batch, classes), random(batch, classes)
    weights = random(batch, coalitions).abs()
    return *head, bits, *game, weights


def explicit_loss(features, weight, bias, *game, **switches):
    return fk.shapley_regression_loss(torch.nn.functional.linear(features, weight, bias), *game, **switches)


def loss_and_gradients(op, arguments, dtype, **switches):
    inputs = [x if x is None or x.dtype == torch.int32 else x.to(dtype).detach().requires_grad_() for x in arguments]
    loss = op(*inputs, **switches)
    leaves = [x for x in inputs if x is not None and x.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves, materialize_grads=True)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_equals_the_loss_of_explicit_shapley_values(generator, normalization, reduction, backend):
    arguments = make_arguments(generator)
    switches = {"normalization": normalization, "reduction": reduction, "backend": backend}
    linear = loss_and_gradients(fk.linear_shapley_loss, arguments, torch.float64, **switches)
    explicit = loss_and_gradients(explicit_loss, arguments, torch.float64, **switches)
    # The bias cancels in the additive normalisation: its gradient is 0 but for rounding at this scale.
    scale = max(float(x.abs().max()) for x in explicit)
    assert all(torch.allclose(x, y, rtol=1e-12, atol=1e-12 * scale) for x, y in zip(linear, explicit, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_bias_is_a_bias_of_zero(generator, backend):
    features, weight, _, bits, *game = make_arguments(generator)
    zero = torch.zeros(9, dtype=torch.float64)
    plain = fk.linear_shapley_loss(features, weight, None, bits, *game, backend=backend)
    assert torch.allclose(plain, fk.linear_shapley_loss(features, weight, zero, bits, *game, backend=backend))


def working(dtype):
    """The residuals of a bfloat16 head are rounded to it on Triton, for its gradients only."""
    return dtype if (dtype, BACKEND) == (torch.bfloat16, "triton") else None


# Normalised, a single player's value is given, and its gradient 0 but for rounding: no scale to compare on.
@pytest.mark.parametrize(
    ("players", "normalization"), [*[(p, "none") for p in PLAYERS], *[(p, "additive") for p in PLAYERS if p > 1]]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_backends_agree(generator, players, normalization, dtype):
    if dtype == torch.float64 and BACKEND == "triton":
        players = min(players, 66)  # coalition_sum's own test has more, a row at a time: the interpreter is slow
    features, weight, _, *game = make_arguments(generator, coalitions=40, players=players)

    def of_head(features, weight, *game, **switches):
        return fk.linear_shapley_loss(features, weight, None, *game, reduction="none", **switches)

    # Without a bias, whose gradient is rounding alone where it cancels; and many coalitions' losses, each by itself:
    # one number may be right by luck.
    def run(backend, *inputs):
        return loss_and_gradients(of_head, inputs, inputs[0].dtype, normalization=normalization, backend=backend)

    assert_all_accurate(run, (features, weight, *game), dtype, terms=players + 3 * 40 + 67, working=working(dtype))


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")  # NumPy's, in Triton's interpreter
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_gradients_that_float16_cannot_hold_are_infinite(generator, reduction):
    features, weight, _, *game = make_arguments(generator, 2, 9, 70, 24, 3)

    def run(backend, features, weight, *others):
        arguments, switches = (features, weight, None, *others), {"reduction": reduction, "backend": backend}
        found = loss_and_gradients(fk.linear_shapley_loss, arguments, features.dtype, **switches)
        assert any(x.isinf().any() for x in found) == (features.dtype == torch.float16)
        return found

    assert_all_accurate(run, (4 * features, 40 * weight, *game), torch.float16, terms=70 + 3 * 9 + 24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_many_classes_and_detached_values(generator, normalization, dtype):
    # More than a kernel goes through at a time; and of the game only the features and the head learn.
    features, weight, _, *game = make_arguments(generator, 2, 3, 5, 16, 4100)

    def run(backend, features, weight, *game):
        head = [x.detach().requires_grad_() for x in (features, weight)]
        switches = {"normalization": normalization, "reduction": "none", "backend": backend}
        loss = fk.linear_shapley_loss(*head, None, *game, **switches)
        return [loss.detach(), *torch.autograd.grad(loss.sum(), head)]

    assert_all_accurate(run, (features, weight, *game), dtype, terms=4100 + 16 + 6, working=working(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_shapley_values_are_never_made(generator, normalization, backend, dtype):
    batch, coalitions, players, width, classes = 2, 3, 64, 8, 500
    arguments = make_arguments(generator, batch, coalitions, players, width, classes)
    with Operators() as ran:
        loss_and_gradients(explicit_loss, arguments, dtype, normalization=normalization, backend=backend)
    assert ran.largest >= batch * players * classes
    with Operators() as ran:
        loss_and_gradients(fk.linear_shapley_loss, arguments, dtype, normalization=normalization, backend=backend)
    assert ran.largest <= max(classes * width, batch * coalitions * classes, batch * players * width)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_additive_game_has_no_loss_and_no_gradient_at_the_truth(generator, normalization, backend):
    features, weight, bias, bits, _, null, _, weights = make_arguments(generator)
    phi = torch.nn.functional.linear(features, weight, bias)
    values, grand = null.unsqueeze(1) + fk.coalition_sum(phi, bits), null + phi.sum(1)
    head = [x.requires_grad_() for x in (features, weight, bias)]
    switches = {"normalization": normalization, "backend": backend}
    loss = fk.linear_shapley_loss(*head, bits, values, null, grand, weights, **switches)
    gradients = torch.autograd.grad(loss, head, materialize_grads=True)
    assert abs(loss.item()) <= 1e-10
    assert all(gradient.abs().max() <= 1e-10 for gradient in gradients)


def test_half_precision_is_pooled_and_compared_in_float32(generator):
    arguments = make_arguments(generator, dtype=torch.bfloat16)
    wide = [x if x.dtype == torch.int32 else x.float() for x in arguments]
    for backend in BACKENDS:
        loss = fk.linear_shapley_loss(*arguments, backend=backend)
        assert loss.dtype == torch.float32
        assert torch.allclose(loss, fk.linear_shapley_loss(*wide, backend=backend), rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_narrow_features_of_a_float64_game_are_pooled_in_float64(generator, backend):
    features, weight, bias, bits, values, *_ = make_arguments(generator, players=257)
    head = [x.float() for x in (features, weight, bias)]
    loss = fk.linear_shapley_loss(*head, bits, values, backend=backend)
    wide = fk.linear_shapley_loss(*[x.double() for x in head], bits, values, backend="reference")
    assert abs(loss / wide - 1) <= 1e-13


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_of_null_is_rounded_once(generator, dtype, backend):
    *head, bits, values, null, grand, weights = make_arguments(generator, dtype=torch.float32)
    null = null.to(dtype)

    def gradient(null):
        x = null.detach().requires_grad_()
        switches = {"normalization": "additive", "reduction": "sum", "backend": backend}
        loss = fk.linear_shapley_loss(*head, bits, values, x, grand, weights, **switches)
        return torch.autograd.grad(loss, x)[0]

    assert torch.equal(gradient(null), gradient(null.float()).to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_autocast_does_not_round(generator, normalization, backend):
    arguments = make_arguments(generator, dtype=torch.float32)
    switches = {"normalization": normalization, "backend": backend}
    with torch.autocast("cpu", torch.bfloat16):
        loss = fk.linear_shapley_loss(*arguments, **switches)
    assert torch.equal(loss, fk.linear_shapley_loss(*arguments, **switches))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_expanded_inputs(generator, backend):
    arguments = make_arguments(generator, dtype=torch.float32)
    expected = loss_and_gradients(fk.linear_shapley_loss, arguments, torch.float32, backend=backend)
    strided = [torch.stack([x, x], -1)[..., 0] for x in arguments]
    ours = loss_and_gradients(fk.linear_shapley_loss, strided, torch.float32, backend=backend)
    assert all(torch.allclose(x, y, rtol=1e-4, atol=1e-5) for x, y in zip(ours, expected, strict=True))
    one = arguments[0][:1]
    expanded = fk.linear_shapley_loss(one.expand(3, -1, -1), *arguments[1:], backend=backend)
    assert torch.equal(expanded, fk.linear_shapley_loss(one.repeat(3, 1, 1), *arguments[1:], backend=backend))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize(("batch", "coalitions"), [(0, 3), (2, 0)])
def test_empty(generator, batch, coalitions, normalization, backend, dtype):
    arguments = make_arguments(generator, batch, coalitions, dtype=dtype)
    switches = {"normalization": normalization, "backend": backend}
    assert fk.linear_shapley_loss(*arguments, reduction="none", **switches).shape == (batch, coalitions)
    assert fk.linear_shapley_loss(*arguments, **switches).isnan()
    results = loss_and_gradients(fk.linear_shapley_loss, arguments, dtype, reduction="sum", **switches)
    assert all(torch.equal(x, torch.zeros_like(x)) for x in results)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_gradcheck(generator, normalization, backend):
    *head, bits, values, null, grand, weights = make_arguments(generator, 2, 2, 3, 2, 2)
    game = [values, null, grand, weights]
    switches = {"normalization": normalization, "reduction": "none", "backend": backend}

    def op(*inputs):
        return fk.linear_shapley_loss(*inputs[:3], bits, *inputs[3:], **switches)

    inputs = [*head, *game]
    without_effect = 5 if normalization == "none" else 2  # grand, and the bias
    for i, x in enumerate(inputs):
        x.requires_grad_(i != without_effect)
    check_gradients(op, inputs)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_second_derivatives_in_float32(generator, normalization):
    """In which Triton has kernels of its own."""
    *head, bits, values, null, grand, weights = make_arguments(generator, 2, 2, 3, 4, 2)

    def second(dtype, backend):
        inputs = [x.to(dtype).requires_grad_() for x in (*head, values, null, grand, weights)]
        switches = {"normalization": normalization, "reduction": "none", "backend": backend}
        loss = fk.linear_shapley_loss(*inputs[:3], bits, *inputs[3:], **switches)
        first = torch.autograd.grad(loss.pow(2).sum(), inputs, create_graph=True, materialize_grads=True)
        return torch.autograd.grad(sum(x.pow(2).sum() for x in first), inputs, materialize_grads=True)

    for ours, wanted in zip(second(torch.float32, BACKEND), second(torch.float64, "reference"), strict=True):
        assert (ours - wanted).norm() <= 1e-4 * wanted.norm()


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_compiles_without_graph_breaks(generator, normalization):
    features, weight, *game = make_arguments(generator, dtype=torch.float32)

    def gradients(run):
        inputs = [x.clone().requires_grad_() for x in (features, weight)]
        return torch.autograd.grad(run(*inputs), inputs)

    def loss(features, weight):
        return fk.linear_shapley_loss(features, weight, *game, normalization=normalization)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert all(torch.allclose(x, y) for x, y in zip(gradients(compiled), gradients(loss), strict=True))


def test_five_runs_give_the_same_bits(generator):
    arguments = make_arguments(generator, width=200, dtype=torch.float32)
    first = loss_and_gradients(fk.linear_shapley_loss, arguments, torch.float32)
    for _ in range(4):
        again = loss_and_gradients(fk.linear_shapley_loss, arguments, torch.float32)
        assert all(torch.equal(x, y) for x, y in zip(again, first, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.zeros(3, 33)}, r"`features` must be a floating-point tensor \(B, P, L\)"),
        ({"features": torch.zeros(3, 33, 6, device="meta")}, "on meta like the other arguments"),
        ({"weight": torch.zeros(4)}, r"`weight` must be a floating-point tensor \(K, L\)"),
        ({"weight": torch.zeros(4, 7)}, r"\(K, L\) with L = 6 like `features`"),
        ({"bias": torch.zeros(1, 4)}, r"`bias` must be a floating-point tensor \(K,\)"),
        ({"bias": torch.zeros(6)}, r"\(K,\) with K = 4 like `weight`"),
        ({"bits": torch.zeros(3, 5, 1, dtype=torch.int32)}, r"`bits` must be int32 \(B, M, 2\) for 33 players"),
        ({"bits": torch.zeros(2, 5, 2, dtype=torch.int32)}, "B = 3"),
        ({"values": torch.zeros(3, 5, 6)}, r"`values` must be \(B, M, K\) = \(3, 5, 4\)"),
        ({"null": torch.zeros(3)}, r"`null` must be \(K,\) or \(B, K\) = \(4,\)"),
        ({"grand": torch.zeros(3, 5)}, r"`grand` must be \(B, K\) = \(3, 4\)"),
        ({"normalization": "additive"}, r"`grand` must be v\(N\)"),
        ({"weights": torch.zeros(5)}, r"`weights` must be a floating-point tensor \(B, M\)"),
        ({"normalization": "efficient"}, "`normalization` must be one of none, additive"),
        ({"reduction": "max"}, "`reduction` must be one of mean, sum, none"),
        ({"backend": "gpu"}, "Choose one of"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {
        "features": torch.zeros(3, 33, 6),
        "weight": torch.zeros(4, 6),
        "bias": None,
        "bits": torch.zeros(3, 5, 2, dtype=torch.int32),
        "values": torch.zeros(3, 5, 4),
    }
    with pytest.raises((ValueError, TypeError), match=f"linear_shapley_loss.*{message}"):
        fk.linear_shapley_loss(**(arguments | change))
