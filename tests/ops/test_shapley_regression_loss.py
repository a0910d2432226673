from functools import partial

import pytest
import torch
from accuracy import (
    BACKEND,
    BACKENDS,
    DTYPES,
    KERNELS,
    PLAYERS,
    assert_all_accurate,
    check_gradients,
    normal,
    random_bits,
)

import fastshap_kernels as fk

REDUCTIONS = ("mean", "sum", "none")
NORMALIZATIONS = ("none", "additive")


def make_game(generator, batch=3, coalitions=5, players=33, classes=67, dtype=torch.float64):
    """phi, bits, values, null, grand, weights."""

    random = partial(normal, generator, dtype=dtype)

    bits = random_bits(batch, coalitions, players, generator)
    game = random(batch, coalitions, classes), random(batch, classes), random(batch, classes)
    weights = random(batch, coalitions).abs()
    return random(batch, players, classes), bits, *game, weights


def definition(phi, bits, values, null, grand, weights, normalization, reduction):
    """The loss by loops."""
    (batch, players, classes), coalitions = phi.shape, bits.shape[1]
    present = fk.unpack_bits(bits, players)
    losses = torch.zeros(batch, coalitions, classes, dtype=phi.dtype)
    for b in range(batch):
        row = phi[b] + (grand[b] - null[b] - phi[b].sum(0)) / players if normalization == "additive" else phi[b]
        for m in range(coalitions):
            predicted = sum((row[p] for p in range(players) if present[b, m, p]), torch.zeros(classes))
            losses[b, m] = weights[b, m] * (values[b, m] - null[b] - predicted) ** 2
    return {"mean": losses.mean(), "sum": losses.sum(), "none": losses.mean(-1)}[reduction]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_definition(generator, normalization, reduction, backend):
    game = make_game(generator, 2, 3, 33, 4)
    switches = {"normalization": normalization, "reduction": reduction}
    loss = fk.shapley_regression_loss(*game, **switches, backend=backend)
    assert torch.allclose(loss, definition(*game, **switches), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_optional_arguments(generator, reduction):
    phi, bits, values, null, _, _ = make_game(generator)
    zero, one = torch.zeros(3, 67, dtype=torch.float64), torch.ones(3, 5, dtype=torch.float64)
    plain = fk.shapley_regression_loss(phi, bits, values, reduction=reduction)
    full = fk.shapley_regression_loss(phi, bits, values, zero, zero, one, reduction=reduction)
    assert torch.allclose(plain, full, rtol=1e-14, atol=0)
    shared = fk.shapley_regression_loss(phi, bits, values, null[0], reduction=reduction)
    each = fk.shapley_regression_loss(phi, bits, values, null[:1].expand(3, -1), reduction=reduction)
    assert torch.equal(shared, each)


def loss_and_gradients(normalization, backend, phi, bits, *rest):
    inputs = [x.detach().requires_grad_() for x in (phi, *rest)]
    # Each coalition's loss by itself: one number may be right by luck.
    switches = {"normalization": normalization, "reduction": "none", "backend": backend}
    loss = fk.shapley_regression_loss(inputs[0], bits, *inputs[1:], **switches)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), inputs, materialize_grads=True)]


# Normalised, a single player's value is given, and its gradient 0 but for rounding: no scale to compare on.
@pytest.mark.parametrize(
    ("players", "normalization"), [*[(p, "none") for p in PLAYERS], *[(p, "additive") for p in PLAYERS if p > 1]]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_backends_agree(generator, players, dtype, normalization):
    batch, coalitions = (3, 40) if players < 1000 else (1, 12)
    game = make_game(generator, batch, coalitions, players=players, classes=9)
    assert_all_accurate(partial(loss_and_gradients, normalization), game, dtype, terms=players + coalitions)


# Few coalitions and many, in vectors and without, in one tile and several.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("coalitions", "classes"), [(8, 136), (33, 264), (70, 131)])
def test_sizes(generator, coalitions, classes, dtype):
    game = make_game(generator, batch=2, coalitions=coalitions, classes=classes)
    assert_all_accurate(partial(loss_and_gradients, "none"), game, dtype, terms=33 + coalitions + classes)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_additive_game_has_no_loss_and_no_gradient_at_the_truth(generator, normalization, backend):
    phi, bits, _, null, _, weights = make_game(generator)
    values = null.unsqueeze(1) + fk.coalition_sum(phi, bits)
    grand = null + phi.sum(1)
    x = phi.requires_grad_()
    switches = {"normalization": normalization, "reduction": "sum", "backend": backend}
    loss = fk.shapley_regression_loss(x, bits, values, null, grand, weights, **switches)
    loss.backward()
    assert abs(loss.item()) <= 1e-10
    assert x.grad.abs().max() <= 1e-10


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_single_player_is_given_everything(generator, backend):
    phi, _, values, null, grand, _ = make_game(generator, players=1)
    x, bits = phi.requires_grad_(), torch.ones(3, 5, 1, dtype=torch.int32)
    loss = fk.shapley_regression_loss(x, bits, values, null, grand, normalization="additive", backend=backend)
    loss.backward()
    assert torch.allclose(loss, (values - grand.unsqueeze(1)).square().mean(), rtol=1e-12, atol=0)
    assert x.grad.abs().max() <= 1e-15


@pytest.mark.parametrize("backend", BACKENDS)
def test_additive_normalization_ignores_a_shift_of_all_players(generator, backend):
    phi, bits, values, null, grand, weights = make_game(generator)
    shift = normal(generator, 3, 1, 67)
    game = bits, values, null, grand, weights
    switches = {"normalization": "additive", "backend": backend}
    loss = fk.shapley_regression_loss(phi, *game, **switches)
    assert torch.allclose(loss, fk.shapley_regression_loss(phi + shift, *game, **switches), rtol=1e-12, atol=0)


def test_half_precision_is_summed_and_compared_in_float32(generator):
    phi, bits, values, *_ = make_game(generator, dtype=torch.bfloat16)
    for backend in BACKENDS:
        loss = fk.shapley_regression_loss(phi, bits, values, backend=backend)
        assert loss.dtype == torch.float32
        wide = fk.shapley_regression_loss(phi.float(), bits, values.float(), backend=backend)
        assert torch.allclose(loss, wide, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_narrow_shapley_values_of_a_float64_game_are_summed_in_float64(generator, backend):
    phi, bits, values, *_ = make_game(generator, players=257)
    phi = phi.float()
    loss = fk.shapley_regression_loss(phi, bits, values, backend=backend)
    wide = fk.shapley_regression_loss(phi.double(), bits, values, backend="reference")
    assert abs(loss / wide - 1) <= 1e-13


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_of_null_is_rounded_once(generator, dtype, backend):
    phi, bits, values, null, grand, weights = make_game(generator, players=16, classes=10, dtype=torch.float32)
    null = null.to(dtype)

    def gradient(null):
        x = null.detach().requires_grad_()
        switches = {"normalization": "additive", "reduction": "sum", "backend": backend}
        return torch.autograd.grad(fk.shapley_regression_loss(phi, bits, values, x, grand, weights, **switches), x)[0]

    assert torch.equal(gradient(null), gradient(null.float()).to(dtype))


def test_mixed_dtypes(generator):
    phi, bits, values, *_ = make_game(generator, dtype=torch.float32)
    for backend in BACKENDS:
        x, y = phi.clone().requires_grad_(), values.double().requires_grad_()
        loss = fk.shapley_regression_loss(x, bits, y, backend=backend)
        loss.backward()
        assert (loss.dtype, x.grad.dtype, y.grad.dtype) == (torch.float64, torch.float32, torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_autocast_does_not_round(generator, normalization, backend):
    game = make_game(generator, dtype=torch.float32)
    switches = {"normalization": normalization, "backend": backend}
    with torch.autocast("cpu", torch.bfloat16):
        loss = fk.shapley_regression_loss(*game, **switches)
    assert torch.equal(loss, fk.shapley_regression_loss(*game, **switches))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_expanded_inputs(generator, backend):
    phi, bits, values, null, grand, weights = make_game(generator, dtype=torch.float32)
    switches = {"normalization": "additive", "backend": backend}
    expected = fk.shapley_regression_loss(phi, bits, values, null, grand, weights, **switches)
    strided = [torch.stack([x, x], -1)[..., 0] for x in (phi, bits, values, null, grand, weights)]
    assert torch.equal(fk.shapley_regression_loss(*strided, **switches), expected)
    one = phi[:1].expand(3, -1, -1)
    loss = fk.shapley_regression_loss(one, bits, values, null[:1].expand(3, -1), grand, weights, **switches)
    copied = null[:1].repeat(3, 1)
    assert torch.equal(
        loss, fk.shapley_regression_loss(one.contiguous(), bits, values, copied, grand, weights, **switches)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize(("batch", "coalitions"), [(0, 3), (2, 0)])
def test_empty(generator, batch, coalitions, normalization, backend):
    phi, *game = make_game(generator, batch, coalitions)
    switches = {"normalization": normalization, "backend": backend}
    assert fk.shapley_regression_loss(phi, *game, reduction="none", **switches).shape == (batch, coalitions)
    assert fk.shapley_regression_loss(phi, *game, **switches).isnan()
    x = phi.requires_grad_()
    loss = fk.shapley_regression_loss(x, *game, reduction="sum", **switches)
    loss.backward()
    assert loss == 0
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_gradcheck(generator, normalization, backend):
    phi, bits, *rest = make_game(generator, 2, 2, 3, 2)

    def op(phi, *rest):
        return fk.shapley_regression_loss(
            phi, bits, *rest, normalization=normalization, reduction="none", backend=backend
        )

    inputs = [x.requires_grad_() for x in (phi, *rest)]
    if normalization == "none":
        inputs[2] = inputs[2].detach()  # grand has no effect
    check_gradients(op, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(generator, dtype):
    phi, bits, target, *_ = make_game(generator, dtype=dtype)
    target = target.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    torch.library.opcheck(KERNELS.shapley_regression_loss.default, (phi.requires_grad_(), bits, target))
    scale = torch.rand(3, 5, generator=generator).to(target.dtype).requires_grad_()
    arguments = target.detach().requires_grad_(), scale, bits, 33, dtype
    torch.library.opcheck(KERNELS.shapley_regression_loss_backward.default, arguments)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_compiles_without_graph_breaks(generator, normalization):
    phi, *game = make_game(generator, dtype=torch.float32)

    def loss(x):
        return fk.shapley_regression_loss(x, *game, normalization=normalization)

    x, y = phi.clone().requires_grad_(), phi.clone().requires_grad_()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(x).backward()
    loss(y).backward()
    assert torch.equal(x.grad, y.grad)


def test_five_runs_give_the_same_bits(generator):
    game = make_game(generator, classes=1100, dtype=torch.float32)
    first = loss_and_gradients("additive", BACKEND, *game)
    for _ in range(4):
        again = loss_and_gradients("additive", BACKEND, *game)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"phi": torch.zeros(3, 33)}, r"`phi` must be a floating-point tensor \(B, P, K\)"),
        ({"phi": torch.zeros(3, 33, 4, dtype=torch.int64)}, "`phi`"),
        ({"phi": torch.zeros(3, 33, 4, device="meta")}, "on meta like the other arguments"),
        ({"bits": torch.zeros(3, 5, 1, dtype=torch.int32)}, r"`bits` must be int32 \(B, M, 2\) for 33 players"),
        ({"values": None}, "`values` must be a tensor"),
        ({"values": torch.zeros(3, 5, 7)}, r"`values` must be \(B, M, K\) = \(3, 5, 4\)"),
        ({"values": torch.zeros(3, 5, 4, dtype=torch.int64)}, "`values`"),
        ({"null": torch.zeros(3)}, r"`null` must be \(K,\) or \(B, K\) = \(4,\)"),
        ({"null": torch.zeros(3, 1, 4)}, "`null`"),
        ({"null": 0.5}, "`null` must be a tensor"),
        ({"grand": torch.zeros(4)}, r"`grand` must be a floating-point tensor \(B, K\)"),
        ({"normalization": "additive"}, r"`grand` must be v\(N\)"),
        ({"weights": torch.zeros(3, 4)}, r"`weights` must be \(B, M\) = \(3, 5\)"),
        ({"weights": torch.zeros(3, 5, device="meta")}, "on cpu like the other arguments"),
        ({"normalization": "multiplicative"}, "`normalization` must be one of none, additive"),
        ({"reduction": "max"}, "`reduction` must be one of mean, sum, none"),
        ({"backend": "gpu"}, "Choose one of"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {
        "phi": torch.zeros(3, 33, 4),
        "bits": torch.zeros(3, 5, 2, dtype=torch.int32),
        "values": torch.zeros(3, 5, 4),
    }
    with pytest.raises((ValueError, TypeError), match=f"shapley_regression_loss.*{message}"):
        fk.shapley_regression_loss(**(arguments | change))
