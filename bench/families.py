"""The smallest model of every timm family: converted and right, before and after training, or refused with a reason.

    python -m bench.families              every family anew
    python -m bench.families resnet eva   some of them

The rows go to bench/results/families.json, which the table of docs/models.md is made of; the slow test
tests/vision/test_timm_families.py checks each row again.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from typing import Any

import timm
import torch
from torch import Tensor, nn

import fastshap_kernels as fk
import fastshap_vision as fv
from bench.lib.results import RESULTS, read, write
from fastshap_vision.games.base import SUPPORTED

FILE = RESULTS / "families.json"
CLASSES = 5
#: Tried in this order, before a model's own: most families take few pixels.
SIZES = (64, 112, 128, 224)
#: Names that say that a model is none of its family's small ones.
LARGE = ("large", "huge", "giant", "xxl", "xlarge", "so400m", "so150m")
#: Of a family's models with the shortest names, how many are measured.
CANDIDATES = 12
#: Families whose smallest model is slow to try: fewer of its blocks say the same.
SHORTENED = {family: {"depth": 2} for family in ("beit", "deepseek_vit", "gemma4_vit", "naflexvit", "qwen3_vit")}
#: Relative to the largest logit. What a wrong game is off by is far more.
TOLERANCE = 1e-3


def smallest(family: str) -> str:
    """The model with the fewest parameters among the family's likely small ones, measured without memory."""
    names = timm.list_models(module=family)
    small = [name for name in names if not any(word in name for word in LARGE)] or names
    return min(sorted(small, key=len)[:CANDIDATES], key=_parameters)


def _parameters(name: str) -> int:
    try:
        with torch.device("meta"):
            model = timm.create_model(name)
    except NotImplementedError:  # some families compute while they are built
        model = timm.create_model(name)
    return sum(parameter.numel() for parameter in model.parameters())


def build(family: str, name: str, size: int) -> nn.Module:
    """The model for images of `size`, with weights, norms, biases and statistics far from their initialisation."""
    torch.manual_seed(0)
    config = timm.get_pretrained_cfg(name)
    options = {"img_size": size} if config.fixed_input_size and size != config.input_size[1] else {}
    options |= SHORTENED.get(family, {})
    model = timm.create_model(name, num_classes=CLASSES, **options)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            if key.endswith("running_var"):
                tensor.mul_(torch.rand_like(tensor) + 0.5)
            elif tensor.numel() == max(tensor.shape, default=1) or not tensor.any():
                tensor.add_(0.1 * torch.randn_like(tensor))
    return model.eval()


def images(size: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def row_of(family: str, name: str, size: int) -> dict[str, Any]:
    """The family's row, with the reason where the model is refused.

    Raises:
        AssertionError: where it is accepted and wrong.
    """
    backbone, x = build(family, name, size), images(size)
    try:
        with torch.no_grad():
            logits = backbone(x)
    except AssertionError as error:
        raise ValueError(f"{name} takes no images of {size} pixels.") from error
    row = {"family": family, "model": name, "image_size": size}
    try:
        model = fv.convert(backbone, img_size=size).eval()
    except fv.UnsupportedModelError as error:
        return row | {"reason": error.reason.removesuffix(f" {SUPPORTED}")}
    nn.init.normal_(model.head.shares.weight, std=0.1)
    check(model, x, logits)
    train(backbone, x)
    with torch.no_grad():
        logits = backbone(x)
    check(model, x, logits)
    check_saving(model, x)
    again = fv.convert(backbone, img_size=size).eval()
    assert (again.removal, again.base) == (model.removal, model.base), "training changes what the model is taken for"
    packs = {True: "packed", False: "masked"}[model.game.packs] if model.removal == "token" else None
    return row | {"removal": model.removal, "base": model.base, "attention": packs}


@torch.no_grad()
def check(model: fv.SelfExplainingClassifier, x: Tensor, logits: Tensor) -> None:
    """Logits to the bit, Σφ = f − v(∅), v(N) = f and v(∅) of the empty coalition."""
    everybody_nobody = torch.zeros(len(x), 2, model.players, dtype=torch.bool)
    everybody_nobody[:, 0] = True
    explanation, null = model.explain(x, "all"), model.null_value()
    values = model.coalition_values(x, fk.pack_bits(everybody_nobody))
    assert torch.equal(model(x), logits), "the logits changed"
    assert torch.equal(explanation.logits, logits), "the explanation has other logits"
    scale = TOLERANCE * max(float(logits.abs().max()), float(null.abs().max()))
    for what, found, expected in (
        ("Σφ = f − v(∅)", explanation.values.sum(1), logits - null),
        ("v(N) = f", values[:, 0], logits),
        ("v of nobody = v(∅)", values[:, 1], null.expand_as(logits)),
    ):
        difference = float((found - expected).abs().max())
        assert difference <= scale, f"{what} is off by {difference:.2g}, logits up to {float(logits.abs().max()):.2g}"


def train(backbone: nn.Module, x: Tensor) -> None:
    """A few steps that move every weight and statistic."""
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.02)
    backbone.train()
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(backbone(x), torch.arange(len(x))).backward()
        nn.utils.clip_grad_norm_(backbone.parameters(), 1.0)
        optimizer.step()
    backbone.eval()


def check_saving(model: fv.SelfExplainingClassifier, x: Tensor) -> None:
    """What is saved and loaded explains to the same bits."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = fv.SelfExplainingClassifier.from_pretrained(folder).eval()
    expected, found = model.explain(x, "all"), again.explain(x, "all")
    assert torch.equal(found.logits, expected.logits), "loaded logits differ"
    assert torch.equal(found.values, expected.values), "loaded Shapley values differ"


def try_sizes(family: str, name: str) -> dict[str, Any]:
    """The row at the smallest size that the model is accepted at; where it never is, at one that it takes."""
    own, refused = timm.get_pretrained_cfg(name).input_size[1], None
    for size in (*(size for size in SIZES if size < own), own):
        try:
            row = row_of(family, name, size)
        except (RuntimeError, TypeError, ValueError, IndexError):  # the model does not take such images
            if size == own:
                raise
            continue
        if "reason" not in row or size == own:
            return row
        if refused is not None and refused["reason"] == row["reason"]:
            return refused  # for what has nothing to do with the size
        refused = row
    raise AssertionError


def main() -> None:
    warnings.simplefilter("ignore")
    known = {row["family"]: row for row in read(FILE, [])}
    wanted = sys.argv[1:] or [family for family in timm.list_modules() if timm.list_models(module=family)]
    for family in wanted:
        name = known[family]["model"] if family in known else smallest(family)
        known[family] = try_sizes(family, name)
        print(json.dumps(known[family]), flush=True)
        write(FILE, [known[family] for family in sorted(known)])


if __name__ == "__main__":
    main()
