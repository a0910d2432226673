"""bench/fidelity/methods.py: each method against known answers, and what it must leave as it found it."""

import math

import pytest
import torch
from timm.models.vision_transformer import ParallelThingsBlock
from torch import nn
from vision_transformers import network

import fastshap_kernels as fk
import fastshap_vision as fv
from bench.fidelity import methods
from bench.fidelity import subject as fidelity_subject
from bench.fidelity.methods import METHODS, Subject, to_patches

CLASSES = 5
VIT = {"img_size": (16, 24), "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
POOLS = {
    "class token": {},
    "average": {"global_pool": "avg", "class_token": False, "fc_norm": False},
    "average, registers": {"global_pool": "avg", "class_token": False, "fc_norm": False, "reg_tokens": 2},
    "average of all": {"global_pool": "avg", "fc_norm": False, "pool_include_prefix": True},
}


class MaskedImageGame(nn.Module):
    """Absent patches' pixels are 0."""

    def __init__(self, model, grid):
        super().__init__()
        self.model, self.grid, self.players = model, grid, grid[0] * grid[1]

    def coalition_values(self, images, bits):
        masked = fk.mask_patches(images, bits, self.grid)
        return self.model(masked).unflatten(0, bits.shape[:2])


class LinearClassifier(nn.Module):
    """f_k(x) = Σ w_k x + b_k; counts evaluations, a backward pass as two."""

    num_classes = 3

    def __init__(self, size):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weight = nn.Parameter(torch.randn(3, *size, generator=generator))
        self.bias = nn.Parameter(torch.tensor([0.5, -1.0, 2.0]))
        self.evaluations = 0

    def forward(self, images):
        self.evaluations += len(images) * (3 if torch.is_grad_enabled() and images.requires_grad else 1)
        return torch.einsum("bchw,kchw->bk", images, self.weight) + self.bias


def patches(pixels, grid):
    """Sum over each patch, one by one."""
    height, width = pixels.shape[2] // grid[0], pixels.shape[3] // grid[1]
    cells = [
        pixels[:, :, row * height : (row + 1) * height, column * width : (column + 1) * width].sum((1, 2, 3))
        for row in range(grid[0])
        for column in range(grid[1])
    ]
    return torch.stack(cells, 1)


def make_images(count, size, seed=4):
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def linear():
    """Subject, images, target and the exact w·x of every patch; rows and columns differ."""
    model = LinearClassifier((2, 8, 9))
    subject = Subject(model, MaskedImageGame(model, (4, 3)))
    images, target = make_images(3, (2, 8, 9)), torch.tensor([0, 2, 1])
    return subject, images, target, patches(images * model.weight.detach()[target], (4, 3))


def make_vit(pool="class token", **options):
    return fv.convert(network("vit_tiny_patch16_224", CLASSES, 0.1, **VIT | POOLS.get(pool, {}) | options)).eval()


def make_cnn():
    model = network("resnet10t", CLASSES, 0.1, channels=(8, 8, 8, 16), stem_width=4, output_stride=8)
    return fv.convert(model, img_size=(16, 24)).eval()


def vit_and_inputs(pool="class token", **options):
    return Subject.of(make_vit(pool, **options)), make_images(3, (3, 16, 24)), torch.tensor([1, 4, 0])


def cnn_and_inputs():
    return Subject.of(make_cnn()), make_images(3, (3, 16, 24)), torch.tensor([1, 4, 0])


@pytest.mark.parametrize(
    ("key", "tolerance"),
    [
        ("gradient_input", 1e-5),
        ("integrated_gradients", 1e-5),
        ("smoothgrad_input", 1e-5),
        ("occlusion", 1e-5),
        ("leave_one_out", 1e-5),
        ("kernel_shap_64", 1e-5),
        ("kernel_shap_512", 1e-5),
        ("kernel_shap_4096", 1e-5),
        ("captum_kernel_shap_512", 1e-4),  # solved in float32, with weights of 1e6
    ],
)
def test_a_linear_classifier_is_attributed_exactly(linear, key, tolerance):
    subject, images, target, exact = linear
    found = METHODS[key](subject, images, target)
    assert (found - exact).abs().max() < tolerance * exact.abs().max()


def test_smoothgrad_of_a_linear_classifier_is_the_size_of_its_weights(linear):
    subject, images, target, _ = linear
    exact = patches(subject.model.weight.detach()[target].abs(), subject.grid)
    assert torch.allclose(METHODS["smoothgrad"](subject, images, target), exact, rtol=1e-4)


def test_noise_of_smoothgrad_is_a_share_of_each_image_s_range():
    class Square(nn.Module):
        num_classes = 1

        def forward(self, images):
            seen.append(images.detach())
            return images.square().sum((1, 2, 3)).unsqueeze(1)

    seen = []
    images = make_images(2, (1, 20, 20)) * torch.tensor([1.0, 30.0]).view(2, 1, 1, 1)
    game = MaskedImageGame(Square(), (2, 2))
    METHODS["smoothgrad"](Subject(game.model, game), images, torch.zeros(2, dtype=torch.int64))
    noisy = torch.cat(seen).unflatten(0, (2, 50))
    deviation = (noisy - images.unsqueeze(1)).std((1, 2, 3, 4))
    ranges = images.amax((1, 2, 3)) - images.amin((1, 2, 3))
    assert torch.allclose(deviation, 0.15 * ranges, rtol=0.03)


def test_random_is_seeded(linear):
    subject, images, target, _ = linear
    found = METHODS["random"](subject, images, target)
    assert torch.equal(found, METHODS["random"](subject, images * 2, target))
    assert not torch.equal(found, methods.random(subject, images, target, seed=1))
    assert found.unique().numel() == found.numel()


@pytest.mark.parametrize("key", ["smoothgrad", "captum_kernel_shap_512", "kernel_shap_64", "kernel_shap_512"])
def test_samples_are_seeded(key):
    subject, images, target = vit_and_inputs()
    before = METHODS[key](subject, images[:2], target[:2])
    torch.rand(7)
    assert torch.equal(before, METHODS[key](subject, images[:2], target[:2]))


def test_integrated_gradients_add_up():
    subject, images, target = vit_and_inputs("average")
    with torch.no_grad():
        moved = (subject.model(images) - subject.model(images * 0)).gather(1, target[:, None])[:, 0]
    found = METHODS["integrated_gradients"](subject, images, target).sum(1)
    assert torch.allclose(found, moved, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("make", [vit_and_inputs, cnn_and_inputs])
def test_patches_are_removed_one_by_one(make):
    subject, images, target = make()
    rows, columns = subject.grid
    height, width = images.shape[2] // rows, images.shape[3] // columns
    occluded, left_out = (METHODS[key](subject, images, target) for key in ("occlusion", "leave_one_out"))
    for p in range(subject.players):
        row, column = divmod(p, columns)
        without = images.clone()
        without[:, :, row * height : (row + 1) * height, column * width : (column + 1) * width] = 0
        present = torch.ones(3, 2, subject.players, dtype=torch.bool)
        present[:, 1, p] = False
        with torch.no_grad():
            fall = (subject.model(images) - subject.model(without)).gather(1, target[:, None])[:, 0]
            values = subject.game.coalition_values(images, fk.pack_bits(present))
        assert torch.allclose(occluded[:, p], fall, atol=1e-5)
        expected = (values[:, 0] - values[:, 1]).gather(1, target[:, None])[:, 0]
        assert torch.allclose(left_out[:, p], expected, atol=1e-5)


# -- KernelSHAP with few coalitions ----------------------------------------------------------------------------------


def test_scarce_coalitions_that_determine_the_values_give_the_same():
    subject, images, target = vit_and_inputs()
    full = fv.kernel_shap_values(subject.game, images, 20, seed=0).phi
    expected = full.gather(2, target.view(-1, 1, 1).expand(-1, subject.players, 1))[..., 0]
    found = methods.kernel_shap(subject, images, target, 22)
    assert torch.allclose(found.float(), expected.float(), atol=1e-4)


def test_coalitions_too_few_leave_the_even_split(linear):
    subject, images, target, exact = linear
    found = methods.kernel_shap(subject, images, target, 4).float()  # one pair says one thing about 12 players
    present = fk.unpack_bits(fk.sample_coalitions(3, 2, 12, seed=0), 12)[:, 0].float()
    assert torch.allclose(found.sum(1), exact.sum(1), atol=1e-4)
    inside = (exact * present).sum(1, keepdim=True)
    outside = (exact * (1 - present)).sum(1, keepdim=True)
    size = present.sum(1, keepdim=True)
    expected = present * inside / size + (1 - present) * outside / (12 - size)
    assert torch.allclose(found, expected, atol=1e-4)


# -- features and attention ------------------------------------------------------------------------------------------


def test_grad_cam_of_a_pooled_map_is_the_class_activation_map():
    subject, images, target = cnn_and_inputs()
    with torch.no_grad():
        features = subject.model.forward_features(images)
        maps = torch.einsum("bchw,bc->bhw", features, subject.model.fc.weight[target])
        logits = subject.model(images).gather(1, target[:, None])[:, 0]
    found = METHODS["grad_cam"](subject, images, target)
    assert torch.allclose(found, maps.flatten(1) / subject.players, atol=1e-5)
    assert torch.allclose(found.sum(1) + subject.model.fc.bias[target], logits, atol=1e-4)


def attention_by_hand(block, tokens):
    """softmax(q kᵀ / √d) and its values, from the weights."""
    attention = block.attn
    width = attention.head_dim
    heads = block.attn.qkv(block.norm1(tokens)).unflatten(2, (3, attention.num_heads, width))
    query, key, value = heads.permute(2, 0, 3, 1, 4)
    return torch.softmax(query @ key.mT / math.sqrt(width), -1), value


def vit_by_hand(model, images):
    """Logits, the attention of every block, and the tokens that enter the last one."""
    tokens = model._pos_embed(model.patch_embed(images))
    maps = []
    for block in model.blocks:
        last = tokens
        attention, value = attention_by_hand(block, tokens)
        maps.append(attention)
        tokens = tokens + block.attn.proj((attention @ value).transpose(1, 2).flatten(2))
        tokens = tokens + block.mlp(block.norm2(tokens))
    return model.forward_head(model.norm(tokens)), maps, last


def pooled(rows, pool):
    """What the logits read, of (T, T): the class token, or the tokens that are averaged."""
    return {
        "class token": lambda: rows[0, 1:],
        "average": lambda: rows.mean(0),
        "average, registers": lambda: rows[2:, 2:].mean(0),
        "average of all": lambda: rows[:, 1:].mean(0),
    }[pool]()


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("pool", POOLS)
def test_rollout_by_hand(pool, depth):
    subject, images, target = vit_and_inputs(pool, depth=depth)
    found = METHODS["attention_rollout"](subject, images, target)
    with torch.no_grad():
        _, maps, _ = vit_by_hand(subject.model, images)
    for b in range(len(images)):
        product = torch.eye(maps[0].shape[-1])
        for attention in maps:
            product = (attention[b].mean(0) + torch.eye(len(product))) / 2 @ product
        assert torch.allclose(found[b], pooled(product, pool), atol=1e-6)
    assert torch.equal(found, METHODS["attention_rollout"](subject, images, target.flip(0)))


@pytest.mark.parametrize("pool", POOLS)
def test_chefer_by_hand(pool):
    subject, images, target = vit_and_inputs(pool)
    found = METHODS["chefer"](subject, images, target)
    for b in range(len(images)):
        logits, maps, _ = vit_by_hand(subject.model, images[b : b + 1])
        relevance = torch.eye(maps[0].shape[-1])
        for attention, gradient in zip(maps, torch.autograd.grad(logits[0, target[b]], maps), strict=True):
            positive = torch.stack([(a * g).clamp(min=0) for a, g in zip(attention[0], gradient[0], strict=True)])
            relevance = relevance + positive.mean(0).detach() @ relevance
        assert torch.allclose(found[b], pooled(relevance, pool), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("pool", POOLS)
def test_grad_cam_of_tokens_by_hand(pool):
    subject, images, target = vit_and_inputs(pool)
    found = METHODS["grad_cam"](subject, images, target)
    prefix = subject.model.num_prefix_tokens
    for b in range(len(images)):
        logits, _, last = vit_by_hand(subject.model, images[b : b + 1])
        gradient = torch.autograd.grad(logits[0, target[b]], last)[0][0, prefix:]
        weights = gradient.mean(0)
        expected = torch.stack([weights @ token for token in last[0, prefix:]])
        assert torch.allclose(found[b], expected, rtol=1e-4, atol=1e-6)


# -- every method ----------------------------------------------------------------------------------------------------

ALL = [(key, make) for key, method in METHODS.items() for make in (vit_and_inputs, cnn_and_inputs)]
SERVED = [(key, make) for key, make in ALL if make is vit_and_inputs or "cnn" in METHODS[key].families]


@pytest.mark.parametrize(("key", "make"), SERVED)
def test_every_method_attributes_and_leaves_no_trace(key, make):
    """Modes, flags, hooks, gradients and random numbers stay, and without gradients around it works too."""
    subject, images, target = make()
    modules = list(subject.game.modules())
    subject.game.train()
    modules[-1].eval()
    modes = [module.training for module in modules]
    flags = [getattr(module, "fused_attn", None) for module in modules]
    buffers = {name: buffer.clone() for name, buffer in subject.game.named_buffers()}
    state = torch.get_rng_state()
    with torch.no_grad():
        found = METHODS[key](subject, images[:2], target[:2])
        assert not torch.is_grad_enabled()
    assert found.shape == (2, subject.players)
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    assert not found.requires_grad
    assert (found.std(1) > 0).all()
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [module.training for module in modules]
    assert flags == [getattr(module, "fused_attn", None) for module in modules]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    assert all(parameter.grad is None for parameter in subject.game.parameters())
    assert all(torch.equal(buffers[name], buffer) for name, buffer in subject.game.named_buffers())
    assert not images.requires_grad


@pytest.mark.parametrize("key", ["grad_cam", "chefer", "gradient_input"])
def test_frozen_parameters_do_not_matter(key):
    subject, images, target = vit_and_inputs()
    expected = METHODS[key](subject, images, target)
    subject.model.requires_grad_(False)
    assert torch.equal(METHODS[key](subject, images, target), expected)


DETERMINISTIC = [
    (key, make) for key, make in SERVED if not any(word in key for word in ("random", "smoothgrad", "kernel_shap"))
]


@pytest.mark.parametrize(("key", "make"), DETERMINISTIC)
def test_parts_are_put_together_in_order(monkeypatch, key, make):
    subject, images, target = make()
    expected = METHODS[key](subject, images, target)
    for module in (methods, fidelity_subject):
        monkeypatch.setattr(module, "AT_ONCE", 8)
    assert torch.allclose(METHODS[key](subject, images, target), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("key", [key for key in METHODS if key not in ("grad_cam", "attention_rollout", "chefer")])
def test_evaluations_are_counted(linear, key):
    subject, images, target, _ = linear
    METHODS[key](subject, images, target)
    assert subject.model.evaluations == len(images) * METHODS[key].evaluations(subject.players)


@pytest.mark.parametrize(
    ("key", "make"), [(key, make) for key, make in SERVED if key in ("grad_cam", "attention_rollout", "chefer")]
)
def test_evaluations_that_read_from_within_are_counted(key, make):
    subject, images, target = make()
    counts = []
    first = subject.model.patch_embed if make is vit_and_inputs else subject.model.layer1

    def count(module, inputs, output):
        counts.append(len(output) * (3 if output.requires_grad else 1))

    handle = first.register_forward_hook(count)
    METHODS[key](subject, images, target)
    handle.remove()
    assert sum(counts) == len(images) * METHODS[key].evaluations(subject.players)


def test_no_more_masked_images_at_once_than_promised():
    class Watched(LinearClassifier):
        def forward(self, images):
            sizes.append(len(images))
            return super().forward(images)

    sizes = []
    model = Watched((1, 20, 15))
    subject = Subject(model, MaskedImageGame(model, (20, 15)))  # 300 players
    images, target = make_images(7, (1, 20, 15)), torch.zeros(7, dtype=torch.int64)
    for key in ("occlusion", "integrated_gradients", "smoothgrad", "captum_kernel_shap_512"):
        METHODS[key](subject, images, target)
    assert 200 < max(sizes) <= 256


# -- wrong input -----------------------------------------------------------------------------------------------------


def test_attention_is_put_back_when_the_model_fails():
    subject, images, target = vit_and_inputs()
    before = [block.attn.fused_attn for block in subject.model.blocks]
    with pytest.raises(RuntimeError):
        METHODS["chefer"](subject, images.long(), target)
    assert [block.attn.fused_attn for block in subject.model.blocks] == before
    assert not any(module._forward_hooks for module in subject.model.modules())


@pytest.mark.parametrize(
    "target",
    [torch.tensor([0, 5, 1]), torch.tensor([0, -1, 1]), torch.tensor([0, 1]), torch.zeros(3), torch.tensor(1), 2, None],
)
def test_a_bad_target_is_named(target):
    subject, images, _ = vit_and_inputs()
    with pytest.raises(ValueError, match=r"occlusion: argument `target` must be int64 \(3,\) in \[0, 5\)"):
        METHODS["occlusion"](subject, images, target)


@pytest.mark.parametrize(
    ("key", "subject", "images", "message"),
    [
        ("chefer", cnn_and_inputs, None, r"Chefer.*`subject` must be a model of vit.*ResNet"),
        ("random", vit_and_inputs, make_images(3, (3, 16, 24))[0], "random: argument `images`"),
        ("random", vit_and_inputs, make_images(0, (3, 16, 24)), "at least one image"),
        ("random", vit_and_inputs, make_images(3, (3, 16, 25)), r"grid \(2, 3\) divides"),
    ],
)
def test_bad_input_is_named(key, subject, images, message):
    subject, good, target = subject()
    with pytest.raises(ValueError, match=message):
        METHODS[key](subject, good if images is None else images, target)


@pytest.mark.parametrize("key", ["grad_cam", "attention_rollout", "chefer"])
def test_another_grid_is_named(key):
    subject, images, target = vit_and_inputs()
    coarse = Subject(subject.model, MaskedImageGame(subject.model, (1, 3)))
    with pytest.raises(ValueError, match=r"model's own grid \(2, 3\)"):
        METHODS[key](coarse, images, target)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_pool": "max", "class_token": False}, "global_pool"),
        ({"block_fn": ParallelThingsBlock}, "ParallelThingsBlock"),
    ],
)
def test_an_attention_that_can_not_be_read_is_named(options, message):
    model = network("vit_tiny_patch16_224", CLASSES, **VIT, **options)
    subject = Subject(model, MaskedImageGame(model, (2, 3)))
    with pytest.raises(ValueError, match=message):
        METHODS["attention_rollout"](subject, make_images(1, (3, 16, 24)), torch.tensor([0]))


def test_logits_that_are_not_the_backbone_s_are_named():
    model = network("vit_tiny_patch16_224", CLASSES, **VIT)
    with pytest.raises(ValueError, match=r"Subject.of.*VotesHead"):
        Subject.of(fv.convert(model, img_size=(16, 24), head="votes"))


def test_to_patches_sums_pixels():
    maps = make_images(2, (3, 6, 8))
    assert torch.allclose(to_patches(maps, (3, 2)), patches(maps, (3, 2)), atol=1e-5)
    assert torch.allclose(to_patches(maps[:, 1], (3, 2)), patches(maps[:, 1:2], (3, 2)), atol=1e-5)
    with pytest.raises(ValueError, match=r"grid \(4, 2\) divides"):
        to_patches(maps, (4, 2))
