"""What the fidelity experiment trains: two networks, the settings that are compared, and the budgets."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

import fastshap_vision as fv
from bench.lib import networks
from fastshap_vision import recipe

#: Of `fv.record_coalitions`.
RECIPE: dict[str, Any] = {"coalitions": recipe.COALITIONS}
#: Of `fv.SelfExplainingClassifier`.
RECIPE_MODEL: dict[str, Any] = {"head": "shares", **recipe.MODEL, "backbone_gradient": 0.0}
_OPTIMIZER = {name: recipe.TRAINING[name] for name in ("opt", "lr")}
#: Of `fv.fit`, by network: for the explainer, where it is not as the classifier's.
RECIPE_TRAINING: dict[str, dict[str, Any]] = {"vit": _OPTIMIZER, "cnn": _OPTIMIZER | recipe.CONVOLUTIONAL}
#: Of `fv.JointObjective`, for training the classifier and its explanation together: its defaults.
TOGETHER: dict[str, Any] = {
    "coalitions": 8,
    "regression_weight": 1.0,
    "masked_task_weight": 0.0,
    "regression_ramp": (0.0, 0.5),
}
#: An image and step, of the amortised explainer.
EXPLAINER_COALITIONS = 2
#: Of an image in an epoch of each: the surrogate's teacher and coalition; the explainer, v(N) and the coalitions.
_EXPLAINER_EVALUATIONS = 2 + 2 + EXPLAINER_COALITIONS
#: A ramp that is none.
FULL = (0.0, 0.0)
#: Of `fv.fit`, for the classifier; its epochs are the budget's.
TRAINING: dict[str, Any] = {
    "batch_size": recipe.TRAINING["batch_size"],
    "lr": 2e-3,
    "weight_decay": recipe.TRAINING["weight_decay"],
    "warmup_epochs": recipe.TRAINING["warmup_epochs"],
    "clip_grad": recipe.TRAINING["clip_grad"],
    "mixed_precision": "bf16",
}


@dataclass(frozen=True)
class Setting:
    """One way to train.

    Args:
        about: what is different from the recipe, in words.
        kind: "task" trains the task alone; "recorded" the explainer of a model that another setting trained, on
            recorded coalitions; "shapley" the task and the regression together; "viashap" with ViaSHAP's objective;
            "amortized" FastSHAP's surrogate and explainer, for a model that another setting trained.
        objective: arguments of the objective, of "recorded" those of `fv.record_coalitions`; of this and "shapley"
            those that differ from `RECIPE` and `TOGETHER`.
        model: arguments of `fv.SelfExplainingClassifier`.
        training: arguments of `fv.fit`, by network, that differ from the budget's.
        starts_from: the setting whose trained weights it goes on from.
        share: of the budget's epochs.
        mirrored: whether each training image is there a second time, as its mirror image.
    """

    about: str
    kind: str = "shapley"
    objective: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=lambda: dict(RECIPE_MODEL))
    training: dict[str, dict[str, Any]] = field(default_factory=dict)
    starts_from: str | None = None
    share: float = 1.0
    mirrored: bool = False


def _recorded(about: str, coalitions: int | None = None, **changes: Any) -> Setting:
    """Of each image and of its mirror image, in as many steps as the plain model's training took."""
    objective = {} if coalitions is None else {"coalitions": coalitions}
    model = RECIPE_MODEL | changes
    return Setting(about, "recorded", objective, model, starts_from="plain", share=0.5, mirrored=True)


def _adamw(about: str, coalitions: int | None = None, **changes: Any) -> Setting:
    return _recorded(f"AdamW: {about}", coalitions, **changes)


def _muon(about: str, coalitions: int | None = None, share: float = 0.5) -> Setting:
    return replace(_recorded(about, coalitions), training=RECIPE_TRAINING, share=share)


def _together(about: str, gradient: float = 0.0, **changes: Any) -> Setting:
    return Setting(f"together: {about}", objective=changes, model=RECIPE_MODEL | {"backbone_gradient": gradient})


def _task(about: str, **changes: Any) -> Setting:
    return Setting(about, kind="task", model={}, **changes)


_VOTES = {"head": "votes"}
SETTINGS: dict[str, Setting] = {
    "plain": _task("the task alone"),
    "recipe": _muon("the recipe"),
    "recipe-double": _muon("the recipe, the explainer trained twice as long", share=1.0),
    "recipe-128": _muon("the recipe, 128 coalitions an image", coalitions=128),
    "adamw": _adamw("else the recipe"),
    "half": replace(_adamw("the explainer trained half as long"), share=0.25),
    "double": replace(_adamw("the explainer trained twice as long"), share=1.0),
    "unmirrored": replace(_adamw("128 coalitions an image, no mirror images", 128), share=1.0, mirrored=False),
    "recorded-32": _adamw("32 coalitions an image", coalitions=32),
    "recorded-128": _adamw("128 coalitions an image", coalitions=128),
    "even": _adamw("shares on the even split", base="even"),
    "depth-0": _adamw("no block before the shares", head_depth=0),
    "depth-1": _adamw("one block before the shares", head_depth=1),
    "last-features": _adamw("the shares read the last features alone", intermediates=False),
    "grey-pixels": _adamw("the game of grey pixels to explain", removal="pixel"),
    "together": _together("no gradient of the regression in the encoder"),
    "M-2": _together("2 coalitions an image and step", coalitions=2),
    "M-4": _together("4 coalitions an image and step", coalitions=4),
    "M-16": _together("16 coalitions an image and step", coalitions=16),
    "unpaired": _together("coalitions not in pairs", paired=False),
    "uniform": _together("coalitions of uniform size", sizes="uniform"),
    "top-3": _together("the 3 likeliest classes", top_classes=3),
    "no-ramp": _together("λ full from the start", regression_ramp=FULL),
    "late-regression": _together("λ rises from half of the schedule on", regression_ramp=(0.5, 0.75)),
    "raw": _together("raw squared error", error="raw"),
    "variance": _together("error relative to the variance of v", error="variance"),
    "masks": _together("the task on masked images too, μ 1", masked_task_weight=1.0),
    "late-masks": _together("μ 1, from half of the schedule on", masked_task_weight=1.0, masked_task_ramp=(0.5, 0.5)),
    "joint": _together("the regression's gradient in the encoder, λ 4", gradient=1.0, regression_weight=4.0),
    "joint-lambda-1": _together("the regression's gradient in the encoder, λ 1", gradient=1.0),
    "joint-masks": _together(
        "the regression's gradient in the encoder, λ 4, μ 1",
        gradient=1.0,
        regression_weight=4.0,
        masked_task_weight=1.0,
    ),
    "live": _together("gradient through v(S) too, λ 1", gradient=1.0, target="live"),
    "votes": Setting("together: votes head", model=_VOTES),
    "plain-half": _task("the task alone, half as long", share=0.5),
    "fine-tuned": replace(
        _together("from the plain model, λ 4", gradient=1.0, regression_weight=4.0), starts_from="plain-half", share=0.5
    ),
    "viashap": Setting("ViaSHAP's objective", kind="viashap", objective={"coalitions": 2}, model=_VOTES),
    "fastshap": Setting("FastSHAP / ViT-Shapley of the plain model", kind="amortized", model={}, starts_from="plain"),
}


@dataclass(frozen=True)
class Budget:
    """How much of the experiment is run."""

    images: int  # that are trained on
    epochs: int
    seeds: tuple[int, ...]
    settings: tuple[str, ...]  # that are trained where no others are asked for
    explained: int  # test images whose Shapley values are compared
    methods_seen: int  # test images on which methods are compared
    networks: dict[str, dict[str, Any]]
    evaluations: int  # most coalitions an image that the reference may take
    training: dict[str, Any] = field(default_factory=lambda: dict(TRAINING))


_SMALL_NETWORKS: dict[str, dict[str, Any]] = {
    "vit": networks.vit(32, patch_size=4, embed_dim=96, depth=3, num_heads=3, mlp_ratio=2.0),
    "cnn": networks.cnn(
        32,
        **{"depths": [1, 1, 1], "channels": [48, 96, 192], "stem_type": "3x3", "stem_chs": 48},
        **{"bottle_ratio": 0.5, "output_stride": 8, "act_layer": "relu"},
    ),
}
_LARGE_NETWORKS: dict[str, dict[str, Any]] = {
    "vit": networks.vit(32, "vit_small_patch16_224", patch_size=4),
    "cnn": networks.cnn(32, stem_type="3x3", stem_chs=64, output_stride=4),
}
_TINY_NETWORKS = {
    "vit": networks.vit(32, patch_size=8, embed_dim=32, depth=2, num_heads=2),
    "cnn": networks.cnn(32, depths=[1], channels=[16], stem_type="3x3", stem_chs=16, output_stride=8),
}
_FIRST = ("plain", "recipe", "fastshap")
BUDGETS: dict[str, Budget] = {
    "tiny": Budget(
        64,
        2,
        (0,),
        ("plain", "recipe", "fine-tuned", "fastshap"),
        4,
        4,
        _TINY_NETWORKS,
        256,
        training=TRAINING | {"batch_size": 32, "mixed_precision": "no"},
    ),
    "small": Budget(16000, 6, (0,), ("plain", "recipe", "together", "joint"), 20, 20, _SMALL_NETWORKS, 8192),
    "medium": Budget(16000, 24, (0, 1, 2), (*_FIRST, *SETTINGS), 200, 100, _SMALL_NETWORKS, 65536),
    "full": Budget(
        40000,
        100,
        (0, 1, 2),
        (*_FIRST, *SETTINGS),
        200,
        200,
        _LARGE_NETWORKS,
        65536,
        training=TRAINING | {"batch_size": 256, "lr": 1e-3, "warmup_epochs": 5},
    ),
}


@dataclass(frozen=True)
class Run:
    """One model that is trained and checked."""

    network: str  # "vit" or "cnn"
    setting: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.network}-{self.setting}-{self.seed}"


def runs_of(budget: Budget, networks: list[str], settings: list[str] | None, seeds: list[int] | None) -> list[Run]:
    """The budget's runs, or those of any settings and seeds, with what they start from."""
    names = list(dict.fromkeys(settings or budget.settings))
    before = [SETTINGS[name].starts_from for name in names]
    names = list(dict.fromkeys([name for name in before if name] + names))
    return [Run(network, name, seed) for seed in (seeds or budget.seeds) for name in names for network in networks]


def make_model(run: Run, budget: Budget, classes: int) -> fv.SelfExplainingClassifier:
    """Equal seeds give equal backbones, whatever the setting."""
    torch.manual_seed(run.seed)
    options = budget.networks[run.network] | SETTINGS[run.setting].model
    return fv.SelfExplainingClassifier(num_classes=classes, **options)


def objective_of(run: Run) -> dict[str, Any]:
    """Arguments of the run's objective, of a "recorded" one those of `fv.record_coalitions`."""
    setting = SETTINGS[run.setting]
    return {"recorded": RECIPE, "shapley": TOGETHER}.get(setting.kind, {}) | setting.objective


def make_objective(run: Run) -> Any:
    setting = SETTINGS[run.setting]
    if setting.kind == "task":
        return fv.TaskObjective()
    if setting.kind == "recorded":
        return fv.ExplainerObjective()
    make = fv.baselines.ViaSHAPObjective if setting.kind == "viashap" else fv.JointObjective
    return make(**objective_of(run), seed=run.seed)


def training_of(run: Run, budget: Budget) -> dict[str, Any]:
    """Arguments of `fv.fit`."""
    return budget.training | SETTINGS[run.setting].training.get(run.network, {})


def images_of(run: Run, budget: Budget) -> int:
    return budget.images * (1 + SETTINGS[run.setting].mirrored)


def epochs_of(run: Run, budget: Budget) -> int:
    return max(1, round(budget.epochs * SETTINGS[run.setting].share))


def explained_of(run: Run, budget: Budget) -> int:
    """Test images whose Shapley values are compared. Those of FastSHAP's game of probabilities take longest."""
    return max(1, budget.explained // 4) if SETTINGS[run.setting].kind == "amortized" else budget.explained


def explainer_epochs(run: Run, budget: Budget) -> int:
    """Of the surrogate and of the explainer each: together they evaluate as much as the recipe does."""
    recipe = evaluations_of(Run(run.network, "recipe", run.seed), budget)
    return max(1, round(recipe / (budget.images * _EXPLAINER_EVALUATIONS)))


def evaluations_of(run: Run, budget: Budget) -> int:
    """Images and coalitions that this training evaluates, not that of what it starts from; all networks alike."""
    setting, images, epochs = SETTINGS[run.setting], images_of(run, budget), epochs_of(run, budget)
    if setting.kind == "amortized":
        return images * explainer_epochs(run, budget) * _EXPLAINER_EVALUATIONS
    if setting.kind == "recorded":
        return images * (objective_of(run)["coalitions"] + epochs)
    objective = {"coalitions": 0, "masked_task_weight": 1.0, "regression_weight": 1.0} | objective_of(run)
    starts = [
        objective.get(f"{term}_ramp", FULL)[0] for term in ("regression", "masked_task") if objective[f"{term}_weight"]
    ]
    return round(images * epochs * (1 + objective["coalitions"] * (1.0 - min(starts))))
