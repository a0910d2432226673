"""timm's options of a run: each has the effect that timm gives it, and a stopped run ends in the same bits."""

from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from test_training import CountingObjective, NoisyNet, assert_same_weights, blobs, interrupt, timeless, train
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch.nn import functional
from torch.utils.data import TensorDataset

import fastshap_vision as fv
from fastshap_vision.training.checkpoint import whole_checkpoints
from fastshap_vision.training.settings import checked_settings, create_optimizer
from fastshap_vision.training.soft_labels import SoftLabels, soft_labels

TINY = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 8, "depth": 3, "num_heads": 1}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Threads only slow down models as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Recorded(CountingObjective):
    """Keeps what it was given."""

    def __init__(self, **options):
        super().__init__(**options)
        self.seen = []

    def __call__(self, model, images, labels, *, progress=1.0):
        last = [
            weight.is_contiguous(memory_format=torch.channels_last) for weight in model.parameters() if weight.ndim == 4
        ]
        self.seen.append((images, labels, last))
        return super().__call__(model, images, labels, progress=progress)


def optimizer(model, **options):
    defaults = {"epochs": 1, "batch_size": 1, "opt": "adamw", "lr": 0.1, "weight_decay": 0.05, "sched": "cosine"}
    defaults |= {"warmup_epochs": 0, "clip_grad": None, "seed": 0, "workers": 0, "mixed_precision": None}
    defaults |= {"grad_accum_steps": None, "compile": None, "layer_decay": None, "opt_betas": None, "min_lr": 0.0}
    defaults |= {"warmup_lr": 1e-5, "smoothing": 0.0, "mixup": 0.0, "cutmix": 0.0, "model_ema_decay": None}
    return create_optimizer(model, checked_settings(defaults | options))


def scales(model, found):
    """The factor of each parameter's rate, by its name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(weight)]: group.get("lr_scale", 1.0) for group in found.param_groups for weight in group["params"]}


def test_layers_learn_at_timms_rates_and_the_explainer_at_the_full_one():
    torch.manual_seed(0)
    backbone = timm.create_model("vit_tiny_patch16_224", num_classes=3, **TINY)
    expected = scales(backbone, timm.optim.create_optimizer_v2(backbone, "adamw", lr=0.1, layer_decay=0.5))
    assert scales(backbone, optimizer(backbone, layer_decay=0.5)) == expected
    model = fv.convert(backbone)
    found = scales(model, optimizer(model, layer_decay=0.5))
    assert {f"backbone.{name}": scale for name, scale in expected.items()}.items() <= found.items()
    rest = {name: scale for name, scale in found.items() if not name.startswith("backbone.")}
    assert rest
    assert set(rest.values()) == {1.0}
    assert found.keys() == dict(model.named_parameters()).keys()
    decayed = {group["weight_decay"] for group in optimizer(model, layer_decay=0.5).param_groups}
    assert decayed == {0.0, 0.05}
    assert min(expected.values()) == 0.5**4


def test_layer_decay_reaches_the_updates():
    def moved(**options):
        torch.manual_seed(0)
        model = fv.convert(timm.create_model("vit_tiny_patch16_224", num_classes=3, **TINY))
        before = model.backbone.patch_embed.proj.weight.detach().clone()
        data = TensorDataset(torch.randn(8, 1, 8, 8), torch.arange(8) % 3)
        arguments = {"epochs": 1, "batch_size": 8, "opt": "sgd", "weight_decay": 0.0, "progress": False}
        result = fv.fit(model, data, objective=fv.TaskObjective(), **arguments | options)
        assert result.history[0]["lr"] == pytest.approx(1e-3)  # of the last layer
        return float((model.backbone.patch_embed.proj.weight - before).detach().norm())

    plain, decayed = moved(sched="constant"), moved(sched="constant", layer_decay=0.5)
    assert decayed / plain == pytest.approx(0.5**4, rel=0.01)
    with pytest.raises(
        ValueError, match=r"`sched` must be a schedule where `layer_decay` is given, such as 'constant'"
    ):
        moved(sched="none", layer_decay=0.5)


def test_betas_and_rates_are_timms():
    assert optimizer(NoisyNet(), opt_betas=(0.8, 0.9)).param_groups[0]["betas"] == (0.8, 0.9)
    _, result = train(warmup_epochs=2, warmup_lr=0.004, min_lr=0.003)
    rates = [row["lr"] for row in result.history]  # of the last of five updates an epoch
    assert rates[0] == pytest.approx(0.004 + 0.006 * 4 / 10)
    assert rates[-1] == pytest.approx(0.003 + 0.007 * 0.5 * (1 + np.cos(np.pi * 19 / 20)))
    with pytest.raises(ValueError, match=r"`opt_betas` must be None for the optimizer 'sgd', which has none"):
        optimizer(NoisyNet(), opt="sgd", opt_betas=(0.8, 0.9))


def test_labels_become_timms_shares():
    images, labels = torch.randn(4, 1, 4, 4), torch.tensor([0, 1, 2, 0])
    _, smooth = SoftLabels(3, 0.3, 0.0, 0.0)(images, labels)
    logits = torch.randn(4, 3)
    expected = functional.cross_entropy(logits, labels, label_smoothing=0.3)
    assert torch.allclose(functional.cross_entropy(logits, smooth), expected)
    kept = images.clone()
    np.random.seed(0)
    mixed, shares = SoftLabels(3, 0.1, 0.8, 1.0)(images, labels)
    np.random.seed(0)
    theirs = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=3)(images.clone(), labels)
    assert torch.equal(mixed, theirs[0])
    assert torch.equal(shares, theirs[1])
    assert torch.equal(images, kept)  # a batch that is read once may be used twice


@pytest.mark.parametrize(
    "options", [{"smoothing": 0.1}, {"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 1.0}]
)
def test_soft_labels_reach_the_objective(options):
    objective = Recorded()
    train(objective=objective, epochs=1, **options)
    for images, labels, _ in objective.seen:
        assert images.shape == (8, 1, 4, 4)
        assert labels.shape == (8, 3)
        assert torch.allclose(labels.sum(1), torch.ones(8))
        assert ((labels > 0) & (labels < 1)).any() or "smoothing" not in options
    data = {tuple(image.flatten().tolist()) for image, _ in blobs()}
    unchanged = [tuple(image.flatten().tolist()) in data for images, _, _ in objective.seen for image in images]
    assert all(unchanged) == ("smoothing" in options)


def test_the_masked_task_takes_soft_labels():
    torch.manual_seed(0)
    model = fv.convert(timm.create_model("vit_tiny_patch16_224", num_classes=3, **TINY))
    images, shares = torch.randn(4, 1, 8, 8), torch.rand(4, 3).softmax(1)
    objective = fv.JointObjective(coalitions=4, masked_task_weight=0.5, seed=0)
    drawn = fv.JointObjective(coalitions=4, masked_task_weight=0.5, seed=0).draw(model, images)
    terms = objective(model, images, shares)
    values = model.coalition_values(images, drawn)
    expected = -(shares[:, None] * values.log_softmax(2)).sum(2).mean()
    assert torch.allclose(terms.masked_task, expected, atol=1e-5)
    assert torch.allclose(terms.task, -(shares * model(images).log_softmax(1)).sum(1).mean(), atol=1e-6)
    data = TensorDataset(images, torch.arange(4) % 3)
    arguments = {"epochs": 1, "batch_size": 4, "progress": False, "mixup": 0.8, "smoothing": 0.1}
    result = fv.fit(model, data, objective=objective, **arguments)
    assert result.history[0]["masked_task"] > 0


def test_the_average_is_timms_and_is_what_is_kept(tmp_path):
    class Averaged(CountingObjective):
        def __call__(self, model, images, labels, *, progress=1.0):
            if self.calls == 0:
                self.average = ModelEmaV3(model, decay=0.7)
            else:
                self.average.update(model, step=self.calls)
            return super().__call__(model, images, labels, progress=progress)

    objective = Averaged()
    plain, without = train(objective=objective)
    objective.average.update(plain.train(), step=20)
    model, result = train(tmp_path, model_ema_decay=0.7)
    for name, tensor in objective.average.module.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert not torch.equal(model.head.weight, plain.head.weight)
    assert [row["loss"] for row in result.history] == [row["loss"] for row in without.history]
    accuracy, loss = fv.evaluate(model, blobs(24), 8)
    assert (accuracy, pytest.approx(loss)) == (result.history[-1]["eval_accuracy"], result.history[-1]["eval_loss"])
    kept = NoisyNet()
    from safetensors.torch import load_model

    load_model(kept, tmp_path / "model.safetensors")
    assert_same_weights(kept, model)


def test_channels_last_holds_for_the_run():
    torch.manual_seed(0)
    model = timm.create_model("test_byobnet", num_classes=3, in_chans=2)
    objective = Recorded()
    data = TensorDataset(torch.randn(4, 2, 32, 32), torch.arange(4) % 3)
    arguments = {"objective": objective, "epochs": 1, "batch_size": 4, "progress": False}
    fv.fit(model, data, **arguments, channels_last=True)
    images, _, last = objective.seen[0]
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert all(last)
    assert len(last) > 5
    assert all(weight.is_contiguous() for weight in model.parameters())
    objective.seen.clear()
    fv.fit(model, data, **arguments)
    images, _, last = objective.seen[0]
    assert images.is_contiguous()
    assert not all(last)


def test_so_many_checkpoints_are_kept(tmp_path):
    train(tmp_path / "three", checkpoint_hist=3)
    assert [path.name for path in whole_checkpoints(tmp_path / "three")] == ["epoch_0002", "epoch_0003", "epoch_0004"]
    train(tmp_path / "one", checkpoint_hist=1)
    assert len(whole_checkpoints(tmp_path / "one")) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"model_ema_decay": 0.9},
        {"smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0},
        {"warmup_epochs": 1, "warmup_lr": 0.001, "min_lr": 0.001, "opt_betas": (0.8, 0.9)},
        {"channels_last": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_stopped_run_ends_in_the_same_bits(tmp_path, options):
    expected, unbroken = train(**options)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, CountingObjective(at=13, event=interrupt), **options)
    resumed, result = train(tmp_path, resume="auto", **options)
    assert timeless(result.history) == timeless(unbroken.history)
    assert_same_weights(resumed, expected)
    again, _ = train(tmp_path, resume="auto", **options)
    assert_same_weights(again, expected)


def test_a_run_stopped_within_an_epoch_ends_in_the_same_bits(tmp_path):
    options = {"model_ema_decay": 0.9, "mixup": 0.8, "smoothing": 0.1, "checkpoint_hist": 1}
    expected, unbroken = train(**options)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, CountingObjective(at=13, event=interrupt), checkpoint_steps=3, **options)
    resumed, result = train(tmp_path, resume="auto", checkpoint_steps=3, **options)
    assert [row["loss"] for row in result.history] == pytest.approx([row["loss"] for row in unbroken.history])
    assert_same_weights(resumed, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_decay": 0}, r"`layer_decay` must be above 0"),
        ({"opt_betas": 0.9}, r"`opt_betas` must be two numbers from 0 to below 1"),
        ({"opt_betas": (0.9, 1.0)}, r"`opt_betas` must be two numbers from 0 to below 1"),
        ({"min_lr": -1}, r"`min_lr` must be"),
        ({"warmup_lr": None}, r"`warmup_lr` must be"),
        ({"model_ema_decay": 1.0}, r"`model_ema_decay` must be below 1"),
        ({"smoothing": 1.0}, r"`smoothing` must be below 1"),
        ({"mixup": "yes"}, r"`mixup` must be"),
        ({"mixup": 0.8, "batch_size": 5}, r"`batch_size` must be even, as mixup and cutmix take images in pairs"),
        ({"channels_last": 1}, r"`channels_last` must be"),
        ({"checkpoint_hist": 0}, r"`checkpoint_hist` must be a whole number from 1"),
    ],
)
def test_values_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        train(**options)


def test_labels_that_are_no_class_numbers_are_not_mixed():
    shares = TensorDataset(torch.randn(8, 1, 4, 4), torch.rand(8, 3))
    with pytest.raises(ValueError, match=r"`mixup` must be 0 for labels that are no class numbers"):
        train(data=shares, mixup=0.8)
    for label in ({"bits": 1}, "one", None, torch.tensor(torch.nan)):  # a dict, as of recorded coalitions
        with pytest.raises(ValueError, match=r"`smoothing` must be 0 for labels that are no class numbers"):
            soft_labels(SimpleNamespace(num_classes=3), (None, label), {"smoothing": 0.1, "mixup": 0.0, "cutmix": 0.0})
    left_out = TensorDataset(torch.randn(8, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2, 0, -100]))
    train(data=left_out, epochs=1)
    with pytest.raises(ValueError, match=r"`train_data` has the label -100"):
        train(data=left_out, epochs=1, smoothing=0.1)
