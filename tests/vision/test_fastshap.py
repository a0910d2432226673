import copy

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from vision_transformers import create, images

import fastshap_kernels as fk
import fastshap_vision as fv

CLASSES, SIZE, PLAYERS = 3, 12, 9
LINKS = {"probability": lambda x: x.softmax(-1), "logit": lambda x: x, "log_probability": lambda x: x.log_softmax(-1)}
LABELS = torch.tensor([0, 3, 6])


def tiny(seed=0, classes=CLASSES, patch=4, **options):
    """A transformer with nine patches."""
    torch.manual_seed(seed)
    kwargs = {"img_size": SIZE, "patch_size": patch, "embed_dim": 32, "depth": 1, "num_heads": 2, "in_chans": 1}
    return timm.create_model("vit_tiny_patch16_224", num_classes=classes, **kwargs | options)


def photographs(count, seed=1):
    """Each class is a bright pattern in two of the nine patches, at random strength, in noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    pixels = 0.5 * torch.randn(count, 1, SIZE, SIZE, generator=generator)
    patches = pixels.unfold(2, 4, 4).unfold(3, 4, 4)
    for index, label in enumerate(labels.tolist()):
        for player in torch.randperm(PLAYERS, generator=generator)[:2].tolist():
            strength = 0.5 + 1.5 * torch.rand((), generator=generator)
            patches[index, 0, player // 3, player % 3, label] += strength
    return TensorDataset(pixels, labels)


def trained(model, objective, epochs, lr=3e-3, **options):
    fv.fit(model, photographs(240), objective=objective, epochs=epochs, batch_size=40, lr=lr, progress=False, **options)
    return model.eval()


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Threads only slow down models as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def teacher():
    return trained(tiny(), fv.TaskObjective(), 12)


@pytest.fixture(scope="module")
def surrogate(teacher):
    game = fv.convert(copy.deepcopy(teacher), head_depth=0)
    return trained(game, fv.baselines.SurrogateObjective(teacher, coalitions=2), 15)


def explainer(kind="class token", link="probability", **options):
    """With weights far from the initialisation, in float64."""
    model = fv.baselines.FastSHAPExplainer(fv.convert(create(kind), **options), create(kind), link)
    nn.init.normal_(model.network.head.shares.weight, std=0.1)
    return model.double()


def divergence(teacher, game, x, bits):
    """KL(teacher(x) ‖ softmax v(S)), written out."""
    wanted = teacher(x).softmax(-1).unsqueeze(1)
    found = game.coalition_values(x, bits).softmax(-1)
    return (wanted * (wanted / found).log()).sum(-1).mean()


# -- the surrogate -----------------------------------------------------------------------------------------


def test_the_surrogate_learns_from_the_divergence_to_the_teacher():
    teacher, game = create("class token"), fv.convert(create("average pooling"))
    teacher.head.weight.data *= 3
    objective = fv.baselines.SurrogateObjective(teacher, coalitions=3, seed=4)
    bits = fv.baselines.SurrogateObjective(teacher, coalitions=3, seed=4).draw(game, images()).bits
    assert bits.shape == (3, 3, 1)
    terms = objective(game, images(), LABELS)
    expected = divergence(teacher, game, images(), bits)
    assert torch.allclose(terms.loss, expected, rtol=1e-4)
    assert torch.equal(terms.task, terms.loss.detach())
    values = game.coalition_values(images(), bits).flatten(0, 1)
    assert torch.allclose(terms.spread, values.var(0, correction=0).mean().sqrt(), rtol=1e-4)
    ours, theirs = (torch.autograd.grad(x, game.backbone.head.weight)[0] for x in (terms.loss, expected))
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_training_lowers_the_divergence(teacher, surrogate):
    x = photographs(60, seed=2).tensors[0]
    bits = fk.sample_coalitions(60, 8, PLAYERS, seed=9)
    with torch.no_grad():
        before = divergence(teacher, fv.convert(copy.deepcopy(teacher)), x, bits)
        assert divergence(teacher, surrogate, x, bits) < 0.8 * before


def test_every_size_is_as_likely_from_nobody_to_everybody():
    game = fv.convert(tiny())
    objective = fv.baselines.SurrogateObjective(tiny(), coalitions=4)
    number = 4 * 5000
    bits = objective.draw(game, torch.zeros(number // 4, 1, SIZE, SIZE)).bits
    present = fk.unpack_bits(bits, PLAYERS).flatten(0, 1)
    counts = present.sum(1).bincount(minlength=PLAYERS + 1).double()
    share = 1 / (PLAYERS + 1)
    assert ((counts / number - share).abs() < 4.5 * (share * (1 - share) / number) ** 0.5).all()
    assert ((present.double().mean(0) - 0.5).abs() < 4.5 * 0.5 / number**0.5).all()
    kernel = fv.baselines.SurrogateObjective(tiny(), coalitions=4, sizes="shapley").draw(
        game, torch.zeros(50, 1, SIZE, SIZE)
    )
    assert torch.equal(kernel.bits, fk.sample_coalitions(50, 4, PLAYERS, seed=0, paired=False))


def test_a_teacher_in_training_mode_is_put_in_evaluation_mode():
    teacher = tiny(drop_rate=0.5).train()
    fv.baselines.SurrogateObjective(teacher)
    assert not any(module.training for module in teacher.modules())


# -- the explainer -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("kind", ["class token", "average pooling"])
def test_values_are_efficient_under_every_link(kind, link):
    model = explainer(kind, link).eval()
    x = images().double()
    phi, grand = model.shapley_values(x)
    assert phi.std(1).min() > 1e-3  # not the even split
    nobody, everybody = fk.pack_bits(torch.stack([torch.zeros(16), torch.ones(16)]).bool()).expand(3, 2, 1).unbind(1)
    logits = model.surrogate(x)
    assert torch.equal(model(x), logits)
    assert torch.equal(grand, LINKS[link](logits))
    assert torch.allclose(model.coalition_values(x, everybody.unsqueeze(1))[:, 0], grand)
    assert torch.allclose(model.coalition_values(x, nobody.unsqueeze(1))[:, 0], model.null_value().expand(3, -1))
    assert (phi.sum(1) - (grand - model.null_value())).abs().max() < 1e-12


@pytest.mark.parametrize("link", LINKS)
def test_explanations_add_up_in_their_unit(link, tmp_path):
    model = explainer(link=link)
    x = images().double()
    every = model.explain(x, "all")
    assert model.training
    assert (every.target, every.grid, every.values.shape) == (None, (4, 4), (3, 16, 7))
    assert every.efficiency_gap() < 1e-12
    assert torch.allclose(every.probabilities, model(x).softmax(-1))
    assert torch.allclose(every[1:].probabilities, model(x)[1:].softmax(-1))
    predicted = model.explain(x)
    assert torch.equal(predicted.target, model(x).argmax(1))
    assert torch.equal(predicted.values, every.values_for())
    assert predicted[0].efficiency_gap() < 1e-12
    assert torch.equal(model.explain(x, torch.tensor([2, 0, 1])).values[1], every.values[1, :, 0])
    predicted.save(tmp_path / "one.safetensors")
    loaded = fv.Explanation.load(tmp_path / "one.safetensors")
    assert type(loaded) is type(predicted) is type(predicted[0])
    assert loaded.unit == {"probability": "probabilities", "logit": "logits"}.get(link, "log-probabilities")
    assert torch.equal(loaded.probabilities, predicted.probabilities)


def test_training_starts_from_the_even_split():
    model = fv.baselines.FastSHAPExplainer(fv.convert(create("class token")), create("class token"))
    phi, grand = model.shapley_values(images())
    assert torch.allclose(phi, ((grand - model.null_value()) / 16).unsqueeze(1).expand_as(phi))


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("link", LINKS)
def test_the_objective_is_the_regression_loss_of_the_values(link, paired):
    model, x = explainer(link=link), images().double()
    terms = fv.baselines.FastSHAPObjective(4, paired=paired, seed=5)(model, x, LABELS)
    bits = fk.sample_coalitions(3, 4, 16, seed=5, paired=paired)
    phi, grand = model.shapley_values(x)
    with torch.no_grad():
        values = LINKS[link](model.surrogate.coalition_values(x, bits))
    null = model.null_value()
    raw = phi - phi.mean(1, keepdim=True)
    expected = fk.shapley_regression_loss(raw, bits, values, null, grand, normalization="additive")
    plain = values - null - torch.einsum("bmp,bpk->bmk", fk.unpack_bits(bits, 16).double(), phi)
    assert torch.allclose(expected, plain.square().mean(), rtol=1e-9)
    assert torch.allclose(terms.loss, expected, rtol=1e-9)
    assert torch.equal(terms.regression, terms.loss.detach())
    variance = values.flatten(0, 1).var(0, correction=0).mean()
    assert torch.allclose(terms.value_r2, 1 - expected.detach() / variance)
    weights = [p for p in model.parameters() if p.requires_grad]
    ours, theirs = (torch.autograd.grad(loss, weights, allow_unused=True) for loss in (terms.loss, expected))
    assert sum(gradient is not None for gradient in ours) > 10
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, rtol=1e-7, atol=1e-12)


def test_no_error_and_no_gradient_at_the_truth_of_an_additive_game():
    """Votes of patches that don't interact, explained by those votes."""
    model = explainer("average pooling", "logit")
    network = model.network
    for backbone in (model.surrogate.backbone, network.backbone):
        for block in backbone.blocks:
            nn.init.zeros_(block.attn.proj.weight)
    for layer in (network.head.explainer.blocks[0].attn.proj, network.head.explainer.blocks[0].mlp.fc2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    network.head.shares.weight.data = network.backbone.head.weight.data / 16
    x = images().double()
    terms = fv.baselines.FastSHAPObjective(8)(model, x, LABELS)
    assert terms.loss < 1e-20
    assert terms.value_r2 == pytest.approx(1)
    terms.loss.backward()
    gradients = [p.grad.abs().max() for p in network.parameters() if p.grad is not None]
    assert len(gradients) > 10
    assert max(gradients) < 1e-9
    features, logits = network.game.features_and_logits(x)
    votes = (features.last @ network.backbone.head.weight.T + network.backbone.head.bias) / 16
    assert torch.allclose(votes.sum(1), logits)
    assert torch.allclose(model.shapley_values(x)[0], votes)


def test_the_explainer_learns_the_values_of_a_trained_game(surrogate):
    before = copy.deepcopy(surrogate.state_dict())
    model = fv.baselines.FastSHAPExplainer(surrogate, tiny(seed=3))
    trained(model, fv.baselines.FastSHAPObjective(8), 30, lr=5e-3)
    assert all(torch.equal(before[name], value) for name, value in surrogate.state_dict().items())
    assert all(parameter.grad is None for parameter in surrogate.parameters())
    x = photographs(24, seed=2).tensors[0]
    score = fv.fidelity(model, x)
    assert score.r2_beyond_even > 0.6
    assert score.efficiency_gap < 1e-5


def test_networks_of_two_families_play_together_and_the_surrogate_never_moves():
    """A convolutional surrogate with batch norms, explained by a transformer; and by a network created by name."""
    torch.manual_seed(0)
    surrogate = fv.convert(timm.create_model("resnet10t", num_classes=7), img_size=64)
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, patch_size=32, embed_dim=48, depth=1, num_heads=3, num_classes=7
    )
    for backbone in (vit, "resnet10t"):
        model = fv.baselines.FastSHAPExplainer(surrogate, backbone).train()
        before = copy.deepcopy(model.state_dict())
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        fv.baselines.FastSHAPObjective(2)(model, images(size=64), LABELS).loss.backward()
        optimizer.step()
        moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert "network.head.shares.weight" in moved
        assert all(name.startswith("network.") for name in moved)
        phi, grand = model.shapley_values(images(size=64))
        assert phi.shape == (3, 4, 7)
        assert (phi.sum(1) - grand + model.null_value()).abs().max() <= 1e-5 * grand.abs().max()


def test_weights_are_saved_and_frozen_ones_are_no_part_of_the_training(surrogate, tmp_path):
    model = fv.baselines.FastSHAPExplainer(surrogate, tiny(seed=3))
    trained(model, fv.baselines.FastSHAPObjective(2), 1, output=tmp_path)
    other = fv.baselines.FastSHAPExplainer(fv.convert(tiny(seed=5), head_depth=0), tiny(seed=6))
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    x = photographs(4).tensors[0]
    assert torch.equal(other.eval().shapley_values(x)[0], model.shapley_values(x)[0])
    assert {"network.backbone.pos_embed", "network.backbone.cls_token"} <= model.no_weight_decay()
    assert not any(name.startswith("surrogate.") for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("stage", ["surrogate", "explainer"])
def test_an_interrupted_run_ends_in_the_same_weights(stage, teacher, surrogate, tmp_path):
    def start():
        if stage == "surrogate":
            return fv.convert(tiny(seed=7), head_depth=0), fv.baselines.SurrogateObjective(teacher)
        return fv.baselines.FastSHAPExplainer(surrogate, tiny(seed=7)), fv.baselines.FastSHAPObjective(2)

    whole = trained(*start(), 2)
    model, objective = start()
    steps = []

    def interrupted(*arguments):
        steps.append(1)
        if len(steps) == 8:
            raise KeyboardInterrupt
        return type(objective).terms(objective, *arguments)

    objective.terms = interrupted
    with pytest.raises(KeyboardInterrupt):
        trained(model, objective, 2, output=tmp_path)
    resumed = trained(*start(), 2, output=tmp_path, resume="auto")
    for (name, value), expected in zip(resumed.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name


@pytest.mark.parametrize("stage", ["surrogate", "explainer"])
def test_steps_compile_whole_and_change_nothing(stage):
    torch._dynamo.reset()
    game, (x, labels) = fv.convert(tiny(), head_depth=0), photographs(3).tensors
    if stage == "surrogate":
        model, make = game, lambda: fv.baselines.SurrogateObjective(tiny(seed=1), coalitions=2)
    else:
        model, make = fv.baselines.FastSHAPExplainer(game, tiny(seed=1)), lambda: fv.baselines.FastSHAPObjective(4)
        nn.init.normal_(model.network.head.shares.weight, std=0.1)
    compiled, plain = make(), make()
    compiled.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    for _ in range(2):
        ours, expected = compiled(model, x, labels).loss, plain(model, x, labels).loss
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


class Twice(nn.Module):
    """Gives its logits and the images, as no teacher does."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x), x


def test_bad_input_is_named(teacher, surrogate):
    x, labels = photographs(3).tensors
    game = fv.convert(tiny())
    for message, call in (
        ("`coalitions` must be a whole number from 1", lambda: fv.baselines.SurrogateObjective(teacher, 0)),
        ("`sizes` must be one of 'shapley', 'uniform'", lambda: fv.baselines.SurrogateObjective(teacher, sizes="all")),
        ("of type SelfExplainingClassifier", lambda: fv.baselines.SurrogateObjective(teacher)(tiny(), x, labels)),
        (r"shares weights.*copy\.deepcopy", lambda: fv.baselines.SurrogateObjective(game.backbone)(game, x, labels)),
        (
            r"`teacher` must be one that returns logits.*\(3, 3\).*\(3, 5\)",
            lambda: fv.baselines.SurrogateObjective(tiny(classes=5))(game, x, labels),
        ),
        ("argument `teacher` must be a module", lambda: fv.baselines.SurrogateObjective(lambda x: x)),
        (
            "`teacher` must be one that returns logits.*tuple",
            lambda: fv.baselines.SurrogateObjective(Twice(teacher))(fv.convert(tiny()), x, labels),
        ),
        (
            "`explainer_backbone` must be a timm model or the name",
            lambda: fv.baselines.FastSHAPExplainer(surrogate, None),
        ),
        ("`coalitions` must be a whole number from 1", lambda: fv.baselines.FastSHAPObjective(0)),
        ("`sizes`", lambda: fv.baselines.FastSHAPObjective(sizes="binomial")),
        ("of type FastSHAPExplainer", lambda: fv.baselines.FastSHAPObjective()(game, x, labels)),
        (
            "`link` must be one of 'probability', 'logit'",
            lambda: fv.baselines.FastSHAPExplainer(surrogate, tiny(), "odds"),
        ),
        ("of type SelfExplainingClassifier", lambda: fv.baselines.FastSHAPExplainer(tiny(), tiny())),
        ("weights of its own", lambda: fv.baselines.FastSHAPExplainer(game, game.backbone)),
        (r"the grid.*\(3, 3\).*\(2, 2\)", lambda: fv.baselines.FastSHAPExplainer(surrogate, tiny(patch=6))),
        (
            "classes of the surrogate, 3, but it has 5",
            lambda: fv.baselines.FastSHAPExplainer(surrogate, tiny(classes=5)),
        ),
        (r"images.*\(1, 12, 12\).*\(1, 16, 16\)", lambda: fv.baselines.FastSHAPExplainer(surrogate, tiny(img_size=16))),
        ("`images` must be a tensor", lambda: fv.baselines.FastSHAPExplainer(surrogate, tiny()).explain(x[0, 0])),
        ("`images` must be finite", lambda: fv.baselines.FastSHAPExplainer(surrogate, tiny()).explain(x / 0)),
        ("`target` must be", lambda: fv.baselines.FastSHAPExplainer(surrogate, tiny()).explain(x, 3)),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_what_a_classifier_takes_and_says_an_explainer_does_too(caplog):
    """Arrays, one image, no image, whole numbers of numpy; the patches' place; and that it was never trained."""
    model = fv.baselines.FastSHAPExplainer(fv.convert(tiny(), head_depth=0), tiny(seed=1))
    x = photographs(2).tensors[0]
    with caplog.at_level("WARNING", logger="fastshap_vision"):
        expected = model.explain(x, "all")
        model.explain(x)
    assert len([record for record in caplog.records if "never trained" in record.message]) == 1
    assert expected.untrained
    assert expected.seen == model.surrogate.explain(x).seen
    assert torch.equal(model.explain(x.numpy(), np.int64(1)).values, expected.values[..., 1])
    assert model.explain(x[0]).values.shape == (1, PLAYERS)
    empty = model.explain(x[:0], "all")
    assert (len(empty), empty.values.shape, empty.values.dtype) == (0, (0, PLAYERS, CLASSES), torch.float32)
    nn.init.ones_(model.network.head.shares.weight)
    assert not model.explain(x).untrained


# -- precision and one logit -------------------------------------------------------------------------------


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("way", ["autocast", torch.bfloat16, torch.float16])
def test_values_add_up_whatever_the_networks_compute_in(link, way):
    """To float32's rounding; rounded to bfloat16 they missed by a hundredth."""
    model, x = explainer(link=link).float(), images()
    nn.init.normal_(model.network.head.shares.weight, std=0.5)
    if way != "autocast":
        model, x = model.to(way), x.to(way)
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        explanation = model.explain(x, "all")
        bits = fk.pack_bits(torch.ones(3, 1, 16, dtype=torch.bool))
        everybody = model.coalition_values(x, bits)[:, 0]
        terms = fv.baselines.FastSHAPObjective(4)(model, x, LABELS)
    assert explanation.values.dtype == explanation.logits.dtype == everybody.dtype == torch.float32
    assert explanation.values.std(1).min() > 0.01
    assert explanation.efficiency_gap() < 3e-5
    terms.loss.backward()
    assert terms.loss.isfinite()


@pytest.mark.parametrize("link", LINKS)
def test_one_logit_is_explained_by_its_sigmoid(link):
    """Its softmax is 1 whatever the image: nothing was there to explain, and nothing to learn from a teacher."""
    surrogate = fv.convert(tiny(classes=1, global_pool="avg", class_token=False), head_depth=0)
    for weight in surrogate.backbone.parameters():
        nn.init.normal_(weight, std=0.3)
    model, x = fv.baselines.FastSHAPExplainer(surrogate, tiny(seed=1, classes=1), link), photographs(4).tensors[0]
    logits = surrogate(x).detach()
    expected = {"probability": logits.sigmoid(), "logit": logits, "log_probability": F.logsigmoid(logits)}[link]
    explanation = model.explain(x)
    assert torch.allclose(explanation.logits, expected)
    assert torch.allclose(explanation.probabilities, logits.sigmoid())
    assert explanation.logits.std() > 0.01
    assert fv.metrics.aopc(model, x, fv.exact_values(model, x).phi[..., 0]).mean > 0.01
    teacher = tiny(seed=2, classes=1)
    nn.init.normal_(teacher.head.weight, std=0.3)
    loss = fv.baselines.SurrogateObjective(teacher, coalitions=1, seed=3)(surrogate, x, torch.zeros(4)).loss
    bits = fv.baselines.SurrogateObjective(teacher, coalitions=1, seed=3).draw(surrogate, x).bits
    p, q = teacher(x).sigmoid(), surrogate.coalition_values(x, bits)[:, 0].sigmoid()
    divergence = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    assert torch.allclose(loss, divergence.mean(), rtol=1e-4)
    assert loss > 1e-3


# -- ViaSHAP -----------------------------------------------------------------------------------------------


def test_viashap_is_its_formula():
    """α · MSE(Σ φ, onehot) + β · MSE(f(∅) + Σ_{p∈S} φ, f(x_S)), and its gradient, with every value in memory."""
    model, x = fv.convert(create("class token"), head="votes"), images()
    loss = fv.baselines.ViaSHAPObjective(alpha=0.7, beta=8.0, coalitions=3, seed=2)(model, x, LABELS).loss
    bits = fk.sample_coalitions(3, 3, 16, seed=2, paired=False)
    phi, _ = model.shapley_values(x)
    values = model.coalition_values(x, bits)
    predicted = model.null_value() + torch.einsum("bmp,bpk->bmk", fk.unpack_bits(bits, 16).float(), phi)
    expected = 0.7 * F.mse_loss(phi.sum(1), F.one_hot(LABELS, 7).float()) + 8.0 * F.mse_loss(predicted, values)
    assert torch.allclose(loss, expected, rtol=1e-4)
    weights = [p for p in model.parameters() if p.requires_grad]
    ours, theirs = (torch.autograd.grad(total, weights, allow_unused=True) for total in (loss, expected))
    assert sum(gradient is not None for gradient in ours) > 20
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        assert one is None or (one - other).norm() <= 1e-3 * other.norm() + 1e-6


def test_viashap_needs_a_model_that_votes():
    with pytest.raises(ValueError, match="head='votes'"):
        fv.baselines.ViaSHAPObjective()(fv.convert(create("class token")), images(), LABELS)
