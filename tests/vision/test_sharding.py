"""What is not known to train in shards is refused by name. tests/vision/test_processes.py trains what is."""

import pytest
import torch
from several_processes import digits, model_of
from test_training import train
from torch import nn

import fastshap_vision as fv
from fastshap_vision.baselines.viashap import ViaSHAPObjective
from fastshap_vision.games.hooks import has_hooks
from fastshap_vision.training.sharding import OPTIMIZERS, check_shardable

SETTINGS = {"mixed_precision": "no", "compile": False, "channels_last": False, "sync_bn": False}
SETTINGS |= {"model_ema_decay": None, "opt": "adamw"}


class Own(fv.Objective):
    def __call__(self, model, images, labels, *, progress=1.0):
        return fv.ObjectiveTerms(nn.functional.cross_entropy(model(images), labels))


def check(model=None, objective=None, processes=2, **options):
    check_shardable(model or model_of("vit"), objective or fv.TaskObjective(), SETTINGS | options, processes)


@pytest.mark.parametrize("opt", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["vit", "eva"])
@pytest.mark.parametrize("objective", [fv.TaskObjective, fv.JointObjective, fv.ExplainerObjective])
def test_what_is_known_is_taken(objective, kind, opt):
    check(model_of(kind), objective(), opt=opt)


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("mixed_precision", "fp16", "'no' or 'bf16'"),
        ("compile", True, "False"),
        ("channels_last", True, "False"),
        ("sync_bn", True, "False"),
        ("model_ema_decay", 0.99, "None"),
        ("opt", "muon", "'adamw' or 'sgd'"),
    ],
)
def test_options_are_refused_by_name(name, value, remedy):
    with pytest.raises(
        ValueError, match=f"`fsdp` is not tested with {name}={value!r}. Leave .*, or pass {name}={remedy}"
    ):
        check(**{name: value})


def test_models_that_do_not_drop_tokens_are_refused():
    hooked = model_of("vit")
    hooked.backbone.blocks[0].register_forward_hook(lambda *_: None)
    assert has_hooks(hooked.backbone.blocks[0])
    for model in (model_of("cnn"), hooked, nn.Linear(2, 2)):
        with pytest.raises(ValueError, match=f"coalitions drop tokens .* this {type(model).__name__} does not"):
            check(model)


@pytest.mark.parametrize("objective", [ViaSHAPObjective, Own])
def test_other_objectives_are_refused(objective):
    with pytest.raises(ValueError, match=f"JointObjective, .*, and not tested with {objective.__name__}"):
        check(objective=objective())


def test_8_bit_targets_are_refused():
    with pytest.raises(ValueError, match=r"no target_precision='fp8', .* with target_precision='bf16'"):
        check(objective=fv.JointObjective(target_precision="fp8"))
    check(objective=fv.JointObjective(target_precision="bf16"))


def test_one_process_is_refused():
    with pytest.raises(ValueError, match="`fsdp` spreads a model over several processes, but there is one"):
        fv.fit(model_of("vit"), digits(8, 16), objective=fv.TaskObjective(), epochs=1, batch_size=4, fsdp=True)
    with pytest.raises(ValueError, match="`fsdp` must be True or False"):
        train(fsdp=torch.tensor(1))


def test_accelerates_own_is_refused_with_the_way_to_have_it(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"train by FSDP .*unset ACCELERATE_USE_FSDP\. Then fit\(fsdp=True\)"):
        train()
