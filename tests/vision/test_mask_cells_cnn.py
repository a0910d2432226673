import pytest
import timm
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_leaves
from vision_transformers import create, images

import fastshap_kernels as fk
from fastshap_vision import Coalitions
from fastshap_vision.games.mask_cells_cnn import CellRemoval

SIZE = (3, 64, 64)
#: The last module of each network's stem, and how many pixels its windows reach over a patch's border.
STEMS = {
    "resnet18": ("maxpool", 5),
    "regnetx_002": ("stem", 1),
    "test_byobnet": ("stem", 1),
    "test_efficientnet": ("bn1", 1),
    "mobilenetv3_small_050": ("bn1", 1),
    "test_convnext": ("stem", 0),
}


def shallow(backbone):
    """The network with the first block of each stage only: what compiles and runs quickly."""
    stages = [
        getattr(backbone, name, None) for name in ("layer1", "layer2", "layer3", "layer4", "s1", "s2", "s3", "s4")
    ]
    for stage in [stage for stage in stages if stage] or getattr(backbone, "blocks", getattr(backbone, "stages", ())):
        blocks = getattr(stage, "blocks", stage)
        for name, _ in list(blocks.named_children())[1:]:
            delattr(blocks, name)
    return backbone


def game(kind, removal="cell", votes=False):
    return CellRemoval(shallow(create(kind)), votes, SIZE, removal)


def draw(game, batch=3, coalitions=4):
    return fk.sample_coalitions(batch, coalitions, game.players, seed=0)


def present(game, bits, height, width):
    """Whether a pixel's player is present: (B·M, 1, height, width)."""
    cells = fk.unpack_bits(bits, game.players).view(-1, 1, *game.grid)
    return cells.repeat_interleave(height // game.grid[0], 2).repeat_interleave(width // game.grid[1], 3)


def plain_values(game, kind, removal, x, bits):
    """The defined game: every coalition runs the whole network, and removal happens at a hook or on the pixels."""
    rows = x.repeat_interleave(bits.shape[1], 0)
    if removal == "cell":
        feature_map = game.backbone.forward_features(torch.where(present(game, bits, *x.shape[2:]), rows, 0.0))
    else:
        stem = game.backbone.get_submodule(STEMS[kind][0])
        hook = stem.register_forward_hook(
            lambda _module, _args, out: torch.where(present(game, bits, *out.shape[2:]), out, 0.0)
        )
        feature_map = game.backbone.forward_features(rows)
        hook.remove()
    pooled = (feature_map * present(game, bits, *game.grid)).sum((2, 3)) / game.players
    if not game.patches_vote:
        values = game.backbone.forward_head(pooled[:, :, None, None])
    else:
        share = fk.unpack_bits(bits, game.players).float().mean(2).flatten().unsqueeze(1)
        weight, bias = game.vote_weight()
        values = pooled @ weight.T + share.to(pooled) * bias
    return values.unflatten(0, bits.shape[:2])


def gradients(game, values):
    """Of a fixed random weighting of the values, for every parameter."""
    weighting = torch.randn(values.shape, generator=torch.Generator().manual_seed(3)).to(values)
    return torch.autograd.grad((values * weighting).sum(), list(game.backbone.parameters()))


def furthest(ours, theirs):
    """The largest relative distance of a parameter's gradients; a vanishing one counts by all of them."""
    whole = torch.stack([gradient.norm() for gradient in theirs]).norm()
    distances = [(a - b).norm() / (b.norm() + 1e-3 * whole) for a, b in zip(ours, theirs, strict=True)]
    return torch.stack(distances).max()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("removal", ["cell", "stem"])
@pytest.mark.parametrize("kind", STEMS)
def test_plays_the_defined_game(kind, removal, training):
    """Values and every parameter's gradient; in training the stem's batch norm sees each image equally often."""
    ours = game(kind, removal)
    ours.backbone.double().train(training)
    x, bits = images(size=64).double(), draw(ours)
    values, expected = ours.values(x, Coalitions(bits, ours.players)), plain_values(ours, kind, removal, x, bits)
    assert (values - expected).norm() <= 1e-9 * expected.norm()
    assert furthest(gradients(ours, values), gradients(ours, expected)) <= 1e-7


@pytest.mark.parametrize("removal", ["cell", "stem"])
@pytest.mark.parametrize("kind", STEMS)
def test_single_precision(kind, removal):
    """Values keep to 1e-5 and every parameter's gradient to 1e-4 of the plain network's."""
    ours, x = game(kind, removal), images(size=64)
    bits = draw(ours)
    values = ours.values(x, Coalitions(bits, ours.players))
    expected = plain_values(ours, kind, removal, x.contiguous(memory_format=torch.channels_last), bits)
    assert (values - expected).norm() <= 1e-5 * expected.norm()
    assert furthest(gradients(ours, values), gradients(ours, expected)) <= 1e-4


@pytest.mark.parametrize("votes", [False, True])
@pytest.mark.parametrize("kind", STEMS)
@torch.no_grad()
def test_efficiency_at_the_stem(kind, votes):
    """v(N) is the model's output and v(∅) the null value, so Shapley values add up to f(x) − v(∅)."""
    ours, x = game(kind, "stem", votes), images(size=64)
    bits = fk.pack_bits(torch.tensor([[1], [0]], dtype=torch.bool).expand(3, 2, ours.players))
    logits = ours.features_and_logits(x)[1]
    grand, null = ours.values(x, Coalitions(bits, ours.players)).unbind(1)
    scale = float(logits.abs().max())
    assert torch.allclose(grand, logits, atol=1e-5 * scale)
    assert torch.allclose(null, ours.null().expand_as(null), atol=1e-5 * scale)
    joint = ours.joint(x, Coalitions(bits, ours.players))
    assert torch.allclose(joint.logits, logits, atol=1e-5 * scale)
    assert torch.allclose(joint.values[:, 0], logits, atol=1e-5 * scale)


@pytest.mark.parametrize("removal", ["cell", "stem"])
@pytest.mark.parametrize("kind", ["resnet18", "test_convnext"])
@torch.no_grad()
def test_joint_pass_is_both_passes(kind, removal):
    ours, x = game(kind, removal), images(size=64)
    bits = draw(ours)
    features, logits = ours.features_and_logits(x)
    joint = ours.joint(x, Coalitions(bits, ours.players))
    joint = (joint.features.last, joint.logits, joint.values)  # patches vote: no v(∅)
    for mine, theirs in zip(
        joint, (features.last, logits, ours.values(x, Coalitions(bits, ours.players))), strict=True
    ):
        assert torch.allclose(mine, theirs, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("method", ["values", "joint"])
@pytest.mark.parametrize("kind", STEMS)
@torch.no_grad()
def test_stem_runs_once_per_image(kind, method):
    ours, x = game(kind, "stem"), images(size=64)
    rows = []
    stem = ours.backbone.get_submodule(STEMS[kind][0])
    hook = stem.register_forward_hook(lambda _module, _args, out: rows.append(len(out)))
    getattr(ours, method)(x, Coalitions(draw(ours), ours.players))
    hook.remove()
    assert rows == [3]


@pytest.mark.parametrize("kind", STEMS)
@torch.no_grad()
def test_reach_of_the_stem(kind):
    """Under "stem", removed pixels act on present neighbours within the documented reach, and no further."""
    reach = STEMS[kind][1]
    ours, x = game(kind, "stem"), images(size=64)
    last_only = torch.zeros(3, 1, ours.players, dtype=torch.bool)
    last_only[..., -1] = True
    bits = fk.pack_bits(last_only)
    values = ours.values(x, Coalitions(bits, ours.players))
    beyond = x.clone()
    beyond[:, :, : 32 - reach] = beyond[:, :, :, : 32 - reach] = float("nan")
    assert torch.equal(ours.values(beyond, Coalitions(bits, ours.players)), values)
    absent = x.clone()
    absent[:, :, :32] = absent[:, :, :, :32] = 5.0
    assert torch.equal(ours.values(absent, Coalitions(bits, ours.players)), values) == (kind == "test_convnext")
    plain, coalitions = game(kind), Coalitions(bits, ours.players)
    assert torch.equal(plain.values(absent, coalitions), plain.values(x, coalitions))


class FirstInput:
    """What the backbone's first convolution is given."""

    def __init__(self, ours):
        convolution = next(m for m in ours.backbone.modules() if isinstance(m, torch.nn.Conv2d))
        convolution.register_forward_pre_hook(lambda _module, args: setattr(self, "seen", args[0]))


@pytest.mark.parametrize(("removal", "rows"), [("cell", 12), ("stem", 3)])
@pytest.mark.parametrize("kind", ["resnet18", "test_convnext"])
@torch.no_grad()
def test_runs_in_channels_last_and_the_compute_dtype(kind, removal, rows):
    ours, x = game(kind, removal), images(size=64)
    bits, first = draw(ours), FirstInput(ours)
    exact = ours.values(x, Coalitions(bits, ours.players))
    assert first.seen.dtype == torch.float32
    assert first.seen.is_contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        values = ours.values(x, Coalitions(bits, ours.players))
    assert first.seen.dtype == torch.bfloat16
    assert first.seen.is_contiguous(memory_format=torch.channels_last)
    assert len(first.seen) == rows
    assert (values - exact).norm() <= 0.05 * exact.norm()
    ours.backbone.bfloat16()
    assert ours.values(x, Coalitions(bits, ours.players)).dtype == torch.bfloat16


@pytest.mark.parametrize("removal", ["cell", "stem"])
def test_construction_leaves_the_network_alone(removal):
    """Weights keep their values and memory format, and modules their mode: a frozen batch norm stays frozen."""
    backbone = create("resnet18").train()
    backbone.bn1.eval()
    state = {name: value.clone() for name, value in backbone.state_dict().items()}
    CellRemoval(backbone, False, SIZE, removal)
    assert all(torch.equal(value, state[name]) for name, value in backbone.state_dict().items())
    assert all(parameter.is_contiguous() for parameter in backbone.parameters())
    assert [name for name, module in backbone.named_modules() if not module.training] == ["bn1"]


@pytest.mark.parametrize("removal", ["cell", "stem"])
@pytest.mark.parametrize("kind", ["resnet18", "test_byobnet", "test_efficientnet", "test_convnext"])
def test_checkpointing_changes_nothing(kind, removal):
    ours, x = game(kind, removal), images(size=64)
    bits = draw(ours)
    plain = ours.values(x, Coalitions(bits, ours.players))
    expected = torch.autograd.grad(plain.square().sum(), list(ours.backbone.parameters()))
    ours.backbone.set_grad_checkpointing()
    values = ours.values(x, Coalitions(bits, ours.players))
    assert torch.equal(values, plain)
    assert all(map(torch.equal, torch.autograd.grad(values.square().sum(), list(ours.backbone.parameters())), expected))


@pytest.mark.parametrize(
    ("kind", "removal", "method"),
    [
        ("resnet18", "cell", "values"),
        ("resnet18", "stem", "joint"),
        ("regnetx_002", "cell", "joint"),
        ("test_efficientnet", "stem", "values"),
        ("mobilenetv3_small_050", "stem", "joint"),
        ("test_convnext", "cell", "joint"),
    ],
)
@torch.no_grad()
def test_compiles_once(kind, removal, method):
    """No graph break, and none of the later coalitions compiles again."""
    ours, x = game(kind, removal), images(size=64)
    run = getattr(ours, method)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for seed in range(4):
        drawn = Coalitions(fk.sample_coalitions(3, 4, ours.players, seed=seed), ours.players)
        for mine, theirs in zip(tree_leaves(compiled(x, drawn)), tree_leaves(run(x, drawn)), strict=True):
            if mine is None:  # v(∅), where patches vote
                continue
            assert torch.allclose(mine, theirs, atol=1e-5 * float(theirs.abs().max()))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: game("resnet18", "token"), "`removal` must be one of 'cell', 'stem'"),
        (
            lambda: CellRemoval(timm.create_model("densenet121", num_classes=7), False, SIZE, "stem"),
            "can't be 'stem' for DenseNet.*ResNet, RegNet, ByobNet, EfficientNet, MobileNetV3, ConvNeXt.*'cell'",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
