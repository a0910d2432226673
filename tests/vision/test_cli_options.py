"""timm's flags reach timm, and a YAML file of flags is as good as the flags."""

import json

import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file
from test_cli import fails

from fastshap_vision import RunStart
from fastshap_vision.cli.config_file import with_config
from fastshap_vision.cli.main import _parser, main

#: A flag, its value, and what `fit` is given.
OF_FIT = [
    (["--min-lr", "1e-5"], {"min_lr": 1e-5}),
    (["--warmup-lr", "1e-6"], {"warmup_lr": 1e-6}),
    (["--opt-betas", "0.8", "0.9"], {"opt_betas": [0.8, 0.9]}),
    (["--layer-decay", "0.75"], {"layer_decay": 0.75}),
    (["--smoothing", "0.1"], {"smoothing": 0.1}),
    (["--mixup", "0.8"], {"mixup": 0.8}),
    (["--cutmix", "1"], {"cutmix": 1.0}),
    (["--model-ema"], {"model_ema_decay": 0.9998}),
    (["--model-ema", "--model-ema-decay", "0.99"], {"model_ema_decay": 0.99}),
    (["--model-ema-decay", "0.99"], {"model_ema_decay": None}),
    (["--sync-bn"], {"sync_bn": True}),
    (["--channels-last"], {"channels_last": True}),
    (["--fsdp"], {"fsdp": True}),
    (["--grad-accum-steps", "4"], {"grad_accum_steps": 4}),
    (["--checkpoint-hist", "5"], {"checkpoint_hist": 5}),
    (["--log-interval", "10"], {"log_interval": 10}),
    (["--amp", "--amp-dtype", "float16"], {"mixed_precision": "fp16"}),
    (["--amp", "--amp-dtype", "bf16"], {"mixed_precision": "bf16"}),
    ([], {"mixed_precision": None, "model_ema_decay": None, "opt_betas": None, "smoothing": 0.0, "min_lr": 0.0}),
]


class Enough(ValueError):
    pass


@pytest.fixture
def asked(monkeypatch):
    """What `fit` is asked for, and the model, of a command that goes no further."""
    found = {}

    def fit(model, *_, **options):
        found.update(options, model=model)
        options["output"].mkdir(exist_ok=True)
        for callback in options["callbacks"]:
            callback.on_start(RunStart(model, {}, options["output"], is_main=True))
        raise Enough("enough")

    monkeypatch.setattr("fastshap_vision.cli.commands.fit", fit)
    return found


@pytest.mark.parametrize(
    ("flags", "expected"), OF_FIT, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_flags_reach_fit(flags, expected, asked, tmp_path):
    main(["train", "--output", str(tmp_path / "run"), *flags])
    assert {name: asked[name] for name in expected} == expected


def test_what_train_explainer_passes_is_an_argument_of_fit(monkeypatch, tmp_path):
    import inspect

    from fastshap_vision import fit
    from fastshap_vision.cli.commands import _settings

    options = _parser().parse_args(["train-explainer", "--checkpoint", "x", "--output", "y", "--model-ema"])
    assert set(_settings(options)) <= set(inspect.signature(fit).parameters)
    assert _settings(options)["model_ema_decay"] == 0.9998


def test_paths_are_dropped_at_the_rate_of_the_flag(asked, tmp_path):
    main(["train", "--output", str(tmp_path / "run"), "--drop-path", "0.2"])
    rates = [block.drop_path1.drop_prob for block in asked["model"].backbone.blocks[1:]]
    assert rates == pytest.approx([0.1, 0.2])
    main(["train", "--output", str(tmp_path / "other")])
    assert not hasattr(asked["model"].backbone.blocks[2].drop_path1, "drop_prob")


def test_training_starts_from_a_file_of_weights(asked, tmp_path, capsys):
    arguments = {"img_size": 8, "patch_size": 2, "embed_dim": 64, "depth": 3, "num_heads": 4, "in_chans": 1}
    torch.manual_seed(7)
    weights = timm.create_model("vit_tiny_patch16_224", num_classes=10, **arguments).state_dict()
    save_file(weights, tmp_path / "weights.safetensors")
    torch.save({"state_dict": weights}, tmp_path / "weights.pth")
    for name in ("weights.safetensors", "weights.pth"):
        main(["train", "--output", str(tmp_path / "run"), "--initial-checkpoint", str(tmp_path / name)])
        assert all(torch.equal(asked["model"].backbone.state_dict()[key], weights[key]) for key in weights)
    torch.save({"state_dict": Enough}, tmp_path / "code.pth")
    for name in ("code.pth", "absent.pth"):
        capsys.readouterr()
        line = fails(capsys, ["train", "--output", tmp_path / "run", "--initial-checkpoint", tmp_path / name])
        assert f"{name}' holds no weights of this model" in line


def test_a_file_of_flags_is_as_good_as_the_flags(asked, tmp_path):
    written = {
        "epochs": 7,
        "lr": "3e-4",
        "opt-betas": [0.8, 0.9],
        "model_ema": True,
        "channels_last": False,
        "aug": False,
        "clip_grad": None,
        "model_kwargs": {"depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 4},
        "model": "vit_tiny_patch16_224",
        "output": str(tmp_path / "run"),
        "batch_size": 16,
    }
    (tmp_path / "flags.yaml").write_text(yaml.safe_dump(written))
    main(["train", "--config", str(tmp_path / "flags.yaml"), "--epochs", "9"])
    assert (asked["epochs"], asked["lr"], asked["opt_betas"], asked["batch_size"]) == (9, 3e-4, [0.8, 0.9], 16)
    assert (asked["model_ema_decay"], asked["channels_last"], asked["clip_grad"]) == (0.9998, False, None)
    assert len(asked["model"].backbone.blocks) == 2
    record = json.loads((tmp_path / "run" / "run.json").read_text())["arguments"]
    assert (record["epochs"], record["aug"], record["config"]) == (9, False, str(tmp_path / "flags.yaml"))


@pytest.mark.parametrize(
    ("text", "expected"), [("no-aug: true", False), ("no_aug: false", True), ("aug: true", True), ("aug: false", False)]
)
def test_a_file_may_name_the_opposite_of_a_flag(text, expected, tmp_path):
    (tmp_path / "flags.yaml").write_text(text)
    parser = _parser()
    commands = next(action.choices for action in parser._actions if action.dest == "name")
    arguments = with_config(["train", "--output", "run", "--config", str(tmp_path / "flags.yaml")], commands)
    assert parser.parse_args(arguments).aug is expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lrr: 1", "names 'lrr', which is no flag of this command. Did you mean 'lr'?"),
        ("lr: fast", "argument --lr: expected a number above 0, but got 'fast'"),
        ("- lr", "must hold flags and their values, one a line, such as lr: 0.001"),
        ("lr: [", "can't be read"),
        ("help: true", "names 'help', which is no flag"),
        ("config: more.yaml", "names 'config', which is no flag"),
    ],
)
def test_a_file_of_wrong_flags_is_refused(text, message, tmp_path, capsys):
    (tmp_path / "flags.yaml").write_text(text)
    line = fails(capsys, ["train", "--config", tmp_path / "flags.yaml", "--output", tmp_path / "run"])
    assert message in line
    assert not (tmp_path / "run").exists()


def test_a_file_that_is_not_there_is_named(tmp_path, capsys):
    line = fails(capsys, ["train", f"--config={tmp_path}/absent.yaml", "--output", tmp_path / "run"])
    assert "argument --config: " in line
    assert "absent.yaml' can't be read" in line


def test_the_flags_of_augmentation_train(tmp_path, capsys):
    """One run with what the fit takes apart: soft labels, an average, accumulation."""
    flags = [
        "--mixup",
        "0.8",
        "--smoothing",
        "0.1",
        "--model-ema",
        "--model-ema-decay",
        "0.9",
        "--masked-task-weight",
        "0.5",
    ]
    small = [
        "--model-kwargs",
        "patch_size=4",
        "embed_dim=16",
        "depth=1",
        "num_heads=2",
        "--model",
        "vit_tiny_patch16_224",
    ]
    arguments = ["train", "--epochs", "1", "--batch-size", "64", "--coalitions", "2", *small, *flags]
    assert main([*arguments, "--grad-accum-steps", "2", "--output", str(tmp_path / "run")]) == 0
    assert "accuracy" in capsys.readouterr().out
