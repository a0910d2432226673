import copy

import numpy as np
import pytest
import torch
from dispatch import Operators
from torch.nn import functional as F
from vision_transformers import converted, create, images

import fastshap_kernels as fk
import fastshap_vision as fv

LABELS = torch.tensor([0, 3, 6])


def model_and_images(kind="class token", **options):
    model = converted(kind, **options)
    return model, images(size=model.game.input_size[1])


def explicit_terms(model, x, bits, error, top=None):
    """The formulas of the objective, written out with every Shapley value in memory."""
    phi, logits = model.shapley_values(x)
    values, null, present = model.coalition_values(x, bits), model.null_value(), fk.unpack_bits(bits, model.players)
    even = null + present.float().mean(2, keepdim=True) * (logits - null).unsqueeze(1)
    order = torch.arange(logits.shape[1]).expand_as(logits) if top is None else logits.topk(top, 1).indices
    counts = order.unsqueeze(1).expand(-1, bits.shape[1], -1)
    residual = (values - null - torch.einsum("bmp,bpk->bmk", present.float(), phi)).gather(2, counts)
    unit = {
        "uniform": (values - even).gather(2, counts).square().mean(),
        "variance": values.gather(2, counts).flatten(0, 1).var(0, correction=0).mean(),
        "raw": 1.0,
    }[error]
    squared = residual.square().mean()
    masked = F.cross_entropy(values.flatten(0, 1), LABELS.repeat_interleave(bits.shape[1]))
    return F.cross_entropy(logits, LABELS), squared / unit, masked


@pytest.mark.parametrize("top", [None, 2])
@pytest.mark.parametrize("error", ["uniform", "variance", "raw"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [("class token", {}), ("average pooling", {"head": "votes"}), ("resnet18", {"base": "votes"})],
)
def test_terms_follow_their_formulas(kind, options, error, top):
    model, x = model_and_images(kind, **options)
    objective = fv.JointObjective(
        4,
        regression_weight=2.0,
        masked_task_weight=0.5,
        error=error,
        regression_ramp=(0, 0),
        seed=5,
        top_classes=top,
    )
    terms = objective(model, x, LABELS)
    bits = fk.sample_coalitions(3, 4, model.players, seed=5)
    task, regression, masked = explicit_terms(model, x, bits, error, top)
    for ours, explicit in ((terms.task, task), (terms.regression, regression), (terms.masked_task, masked)):
        assert torch.allclose(ours, explicit, rtol=1e-4)
    assert torch.allclose(terms.loss, task + 2.0 * regression + 0.5 * masked, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("class token", {}), ("average pooling", {"head": "votes"}), ("average pooling", {"base": "votes"})],
)
def test_the_top_of_all_classes_is_all_of_them(kind, options):
    model, x = model_and_images(kind, **options)
    gradients, losses = [], []
    for top in (None, 1000):
        model.zero_grad()
        loss = fv.JointObjective(4, regression_ramp=(0, 0), top_classes=top)(model, x, LABELS).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert torch.allclose(*losses, rtol=1e-5)
    largest = max(float(gradient.abs().max()) for gradient in gradients[0])
    for all_of_them, top_of_them in zip(*gradients, strict=True):
        assert torch.allclose(all_of_them, top_of_them, rtol=1e-3, atol=1e-5 * largest)


def test_top_classes_keep_double_precision():
    model, x = model_and_images()
    model, x = model.double(), x.double()
    losses = [
        fv.JointObjective(4, regression_ramp=(0, 0), top_classes=top)(model, x, LABELS).loss for top in (None, 1000)
    ]
    assert torch.allclose(*losses, rtol=1e-12)


def encoder_gradient(model, x, **options):
    """Gradient of the regression alone in the encoder's first layer."""
    model.zero_grad()
    fv.JointObjective(4, regression_ramp=(0, 0), task_loss=lambda logits, labels: logits.sum() * 0, **options)(
        model, x, LABELS
    ).loss.backward()
    return model.backbone.patch_embed.proj.weight.grad.clone()


def test_a_live_target_moves_the_values():
    model, x = model_and_images(backbone_gradient=0.0)
    assert encoder_gradient(model, x).abs().sum() == 0
    assert encoder_gradient(model, x, target="live").abs().sum() > 0


def test_no_values_are_kept_when_nothing_flows_back():
    """With μ = 0 and a detached target, the gradient is that of the joint pass without its coalition part."""
    model, x = model_and_images(backbone_gradient=1.0)
    gradient = encoder_gradient(model, x, masked_task_weight=0.0)
    tiny = encoder_gradient(model, x, masked_task_weight=1e-30)
    assert gradient.abs().sum() > 0
    assert (gradient - tiny).norm() <= 1e-4 * tiny.norm()


def test_masked_images_leave_the_batch_norms_alone_when_nothing_flows_back():
    """Running statistics are those of a plain step, and v(S) is that of the trained model's game."""
    model, x = model_and_images("resnet18")
    bits = fk.sample_coalitions(3, 4, model.players, seed=0)
    expected = model.coalition_values(x, bits)
    plain = copy.deepcopy(model).train()
    plain(x)
    inner, seen = model.regression_loss, []

    def watch(features, logits, bits, values, *others):
        seen.append(values)
        return inner(features, logits, bits, values, *others)

    model.regression_loss = watch
    fv.JointObjective(4, seed=0)(model.train(), x, LABELS).loss.backward()
    assert torch.allclose(seen[0], expected, atol=1e-5)
    assert all(module.training for module in model.modules())
    for (name, ours), theirs in zip(model.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs), name


def test_ramps():
    model, x = model_and_images()
    objective = fv.JointObjective(2, 2.0, 3.0, regression_ramp=(0.25, 0.75), masked_task_ramp=(0.5, 0.5))
    plain = objective(model, x, LABELS, progress=0.0)
    assert plain.regression is None
    assert torch.equal(plain.loss, F.cross_entropy(model(x), LABELS))
    for progress, regression, masked in ((0.375, 0.25, 0), (0.5, 0.5, 1), (0.75, 1, 1), (1.0, 1, 1)):
        terms = objective(model, x, LABELS, progress=progress)
        expected = terms.task + 2.0 * regression * terms.regression
        if masked:
            expected = expected + 3.0 * terms.masked_task
        assert (terms.masked_task is None) is (masked == 0)
        assert torch.allclose(terms.loss, expected)


def test_each_step_draws_anew_and_resumes_exactly():
    model, x = model_and_images()

    def losses(objective, steps):
        return [objective(model, x, LABELS).loss.item() for _ in range(steps)]

    whole = losses(fv.JointObjective(2, seed=3), 4)
    assert len(set(whole)) == 4
    first = fv.JointObjective(2, seed=3)
    start = losses(first, 2)
    second = fv.JointObjective(2, seed=3)
    second.load_state_dict(first.state_dict())
    assert start + losses(second, 2) == whole


@pytest.mark.parametrize(("coalitions", "batch"), [(3, 2), (8, 16)])
def test_unpaired_coalitions_fall_into_few_sizes(coalitions, batch):
    """All of them hold the tokens that are present, and none pads by more than two standard deviations."""
    model = fv.convert(create("class token"))
    objective = fv.JointObjective(coalitions, paired=False)
    objective.compile()  # nothing is padded for plain steps on the CPU
    sizes = set()
    for _ in range(200):
        drawn = objective.draw(model, images(1).expand(batch, -1, -1, -1))
        bits, rows = drawn.bits, drawn.rows
        needed = int(fk.unpack_bits(bits, model.players).sum()) + batch * coalitions
        assert needed <= rows <= needed + 0.82 * model.players * (batch * coalitions) ** 0.5 + 1
        sizes.add(rows)
    assert 2 <= len(sizes) <= 6
    assert objective.draw(model, images(0)).rows == 0


@pytest.mark.parametrize("coalitions", [1, 3, 4])
@pytest.mark.parametrize("paired", [True, False])
def test_any_number_of_coalitions(coalitions, paired):
    model, x = model_and_images()
    terms = fv.JointObjective(coalitions, paired=paired)(model, x, LABELS)
    assert torch.isfinite(terms.loss)


def test_perfect_explanations_leave_no_regression():
    """A game in which patches don't interact is explained without error by its votes."""
    model, x = model_and_images("average pooling", head="votes")
    for block in model.backbone.blocks:
        torch.nn.init.zeros_(block.attn.proj.weight)
    terms = fv.JointObjective(4)(model, x, LABELS)
    assert terms.regression <= 1e-9
    assert terms.value_r2 >= 1 - 1e-9


def constant_game(kind):
    """A game whose values are equal: all 0; all the classifier's bias; or equal up to rounding, as the class token
    sees no patch."""
    model, x = model_and_images()
    if kind == "unseen patches":
        for block in model.backbone.blocks:
            torch.nn.init.zeros_(block.attn.proj.weight)
    else:
        torch.nn.init.zeros_(model.backbone.head.weight)
        torch.nn.init.constant_(model.backbone.head.bias, 0.0 if kind == "zero" else 3.0)
    return model, x


@pytest.mark.parametrize("error", ["uniform", "variance"])
@pytest.mark.parametrize("kind", ["zero", "bias", "unseen patches"])
def test_a_constant_game_leaves_nothing_to_explain(kind, error):
    """R is what the shares miss, in logits²; steps of SGD shrink it; value_r2, a share of nothing, is no number."""
    model, x = constant_game(kind)
    shares = [*model.head.explainer.parameters(), model.head.shares.weight]
    losses = []
    for _ in range(10):
        objective = fv.JointObjective(4, error=error, regression_ramp=(0, 0), task_loss=lambda f, y: f.sum() * 0)
        terms = objective(model, x, LABELS)  # the same coalitions in each step
        assert terms.value_r2.isnan()
        losses.append(float(terms.regression))
        model.zero_grad()
        terms.loss.backward()
        with torch.no_grad():
            for weight in shares:
                weight -= 0.01 * weight.grad
    assert 0 < losses[-1] < losses[0] < 100


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-15])
def test_a_game_of_any_size_is_explained_in_its_own_unit(scale):
    """Only what is no more than rounding beside the values themselves counts as constant."""
    model, x = model_and_images()
    options = {"regression_ramp": (0, 0), "seed": 1}
    expected = fv.JointObjective(4, **options)(model, x, LABELS)
    for weight in (*model.backbone.head.parameters(), model.head.shares.weight):
        weight.data *= scale
    found = fv.JointObjective(4, **options)(model, x, LABELS)
    torch.testing.assert_close(found.regression, expected.regression, rtol=1e-3, atol=0)
    torch.testing.assert_close(found.value_r2, expected.value_r2, rtol=1e-3, atol=1e-3)


def test_no_values_per_patch_and_class_exist_in_training():
    classes, players, batch = 997, 16, 12
    model = fv.convert(create("class token", classes=classes))
    with Operators() as ran:
        fv.JointObjective(2, masked_task_weight=1.0)(model, images(batch), LABELS.repeat(4)).loss.backward()
    assert ran.largest < batch * players * classes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coalitions": 0}, "`coalitions`"),
        ({"coalitions": 2.5}, "`coalitions` must be a whole number"),
        ({"coalitions": True}, "`coalitions` must be a whole number"),
        ({"regression_weight": -1.0}, "`regression_weight`"),
        ({"regression_weight": float("nan")}, "`regression_weight` must be a finite number ≥ 0, but it is nan"),
        ({"regression_weight": float("inf")}, "`regression_weight` must be a finite number ≥ 0"),
        ({"regression_weight": "a"}, "`regression_weight` must be a finite number"),
        ({"masked_task_weight": float("nan")}, "`masked_task_weight` must be a finite number"),
        ({"masked_task_weight": -1.0}, "`masked_task_weight`"),
        ({"paired": 1}, "`paired` must be True or False"),
        ({"seed": -1}, "`seed` must be a whole number from 0"),
        ({"seed": 2**64}, "`seed` must be a whole number from 0"),
        ({"seed": 0.5}, "`seed` must be a whole number"),
        ({"top_classes": 2.5}, "`top_classes` must be a whole number.*None for all"),
        ({"regression_ramp": 0.5}, "`regression_ramp` must be \\(start, end\\)"),
        ({"regression_ramp": ("a", "b")}, "`regression_ramp`"),
        ({"regression_ramp": (0.0, float("nan"))}, "`regression_ramp`"),
        ({"error": "relative"}, "`error` must be one of 'uniform', 'variance', 'raw'"),
        ({"target": "dead"}, "`target`"),
        ({"sizes": "binomial"}, "`sizes`"),
        ({"top_classes": 0}, "`top_classes`"),
        ({"regression_ramp": (0.5, 0.2)}, "`regression_ramp`"),
        ({"masked_task_ramp": (0.5, 1.2)}, "`masked_task_ramp`"),
    ],
)
def test_bad_input_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        fv.JointObjective(**options)


@pytest.mark.parametrize("name", ["alpha", "beta"])
@pytest.mark.parametrize("value", [float("nan"), -1.0, "a", None])
def test_bad_weights_of_viashap_are_named(name, value):
    with pytest.raises(ValueError, match=f"ViaSHAPObjective: argument `{name}` must be a finite number ≥ 0"):
        fv.baselines.ViaSHAPObjective(**{name: value})


def test_numbers_may_be_numpys():
    """And are kept as Python's: a run's settings name them."""
    objective = fv.JointObjective(np.int64(4), np.float32(0.5), seed=np.int32(3))
    assert (objective.coalitions, objective.regression_weight, objective.seed) == (4, 0.5, 3)
    kinds = {name: type(objective.settings[name]) for name in ("coalitions", "regression_weight", "seed")}
    assert kinds == {"coalitions": int, "regression_weight": float, "seed": int}
