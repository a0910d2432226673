"""What a self-explaining model says about a batch of images: Shapley values, logits, and how to look at them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from fastshap_kernels._checks import check_dense, describe, fail

from .._checks import check_classes
from .as_shap import as_shap
from .file import read, write
from .link import LINKS
from .pixels import seen_pixels
from .plotting import check_drawing, displayable, draw_heatmap, end_of_scale, label_bar, pyplot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TENSORS = ("values", "logits", "null", "target", "standard_error")
_LISTED = 16  # targets that a line has room for


@dataclass(eq=False, repr=False)
class Explanation:
    """Shapley values of a batch of images, one per patch: how much each patch moved the logit of a class.

    values[b].sum() = logits[b, target[b]] − null[target[b]], for every image: the unit is the logit's.

    Args:
        values (floating point): (B, P) for one target per image, (B, P, K) for every class.
        logits (floating point): (B, K).
        target (int64): (B,) the class that `values` explain, or None when they explain all K.
        grid: (h, w) patches per column and per row, P = h·w, row by row.
        null (floating point): (K,) the logits with no patch present.
        seen: the share of an image's height and of its width, from the top left, that the grid covers, in (0, 1]; the
            model sees nothing of the rest.
        untrained: whether the model had never been trained to explain.
        standard_error (floating point): of each of `values`, of their shape; None where the model is not calibrated.
        evaluations: coalitions of each image that the values were refined by.

    Raises:
        ValueError: when the shapes do not fit each other.

    Example:
        >>> model.explain(images, target=3)
        Explanation(4 images, grid=(3, 3), 10 classes, target=[3, 3, 3, 3], of an untrained explainer)
    """

    values: Tensor
    logits: Tensor
    target: Tensor | None
    grid: tuple[int, int]
    null: Tensor
    seen: tuple[float, float] = (1.0, 1.0)
    untrained: bool = False
    standard_error: Tensor | None = None
    evaluations: int = 0

    unit: ClassVar[str] = "logits"

    def __post_init__(self) -> None:
        for name in _TENSORS:
            if name not in ("target", "standard_error") or getattr(self, name) is not None:
                check_dense("Explanation", name, getattr(self, name), "a tensor")
        sides = self.grid if isinstance(self.grid, tuple | list) else ()
        if len(sides) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) for side in sides):
            fail("Explanation", "grid", "two whole numbers (h, w)", self.grid)
        if self.logits.ndim != 2:
            fail("Explanation", "logits", "(B, K)", self.logits)
        batch, classes = self.logits.shape
        players = self.grid[0] * self.grid[1]
        expected = (batch, players, classes) if self.target is None else (batch, players)
        if self.values.shape != expected:
            each = "every class (target=None)" if self.target is None else "one target per image"
            fail("Explanation", "values", f"{expected} for {each} on the grid {self.grid}", self.values)
        if self.target is not None and (self.target.shape != (batch,) or self.target.dtype != torch.int64):
            fail("Explanation", "target", f"int64 ({batch},)", self.target)
        if self.null.shape != (classes,):
            fail("Explanation", "null", f"({classes},)", self.null)
        if self.standard_error is not None and self.standard_error.shape != self.values.shape:
            fail("Explanation", "standard_error", f"{tuple(self.values.shape)} like `values`", self.standard_error)
        if len(self.seen) != 2 or not all(0 < share <= 1 for share in self.seen):
            fail("Explanation", "seen", "two shares in (0, 1]", self.seen)

    def __len__(self) -> int:
        return self.logits.shape[0]

    def __getitem__(self, index: Any) -> Explanation:
        """The explanation of some of the images, a batch of one for a whole number."""
        if isinstance(index, bool | float | str | None):
            expected = "a whole number, a slice, or whole numbers or booleans for images"
            raise TypeError(f"Explanation: an index must be {expected}, but it is {describe(index)}.")
        if isinstance(index, Integral) or (isinstance(index, Tensor) and index.ndim == 0):
            index = int(index)
            if not -len(self) <= index < len(self):
                raise IndexError(f"Explanation: index {index} is out of range for {len(self)} images")
            index = slice(index % len(self), index % len(self) + 1)
        target = None if self.target is None else self.target[index]
        error = None if self.standard_error is None else self.standard_error[index]
        return replace(self, values=self.values[index], logits=self.logits[index], target=target, standard_error=error)

    def __repr__(self) -> str:
        target = "all" if self.target is None else self.target.tolist()
        if len(self) > _LISTED and self.target is not None:
            target = f"{len(self)} classes"
        marked = ", of an untrained explainer" if self.untrained else ""
        kind, classes = type(self).__name__, self.logits.shape[1]
        images = "1 image" if len(self) == 1 else f"{len(self)} images"
        return f"{kind}({images}, grid={self.grid}, {classes} classes, target={target}{marked})"

    def to(self, *arguments: Any, **options: Any) -> Explanation:
        """The same explanation on another device or in another floating-point type, as `torch.Tensor.to` takes them."""
        values = self.values.to(*arguments, **options)
        target = None if self.target is None else self.target.to(values.device)
        logits, null = (part.to(*arguments, **options) for part in (self.logits, self.null))
        error = None if self.standard_error is None else self.standard_error.to(*arguments, **options)
        return replace(self, values=values, logits=logits, null=null, target=target, standard_error=error)

    def cpu(self) -> Explanation:
        """The same explanation on the CPU."""
        return self.to("cpu")

    @property
    def expected_error(self) -> Tensor | None:
        """How far the values of an image are from its Shapley values, as expected: √Σ_p standard_error².

        (B,), or (B, K) where every class is explained, in the values' unit; None where the model is not calibrated.
        """
        return None if self.standard_error is None else self.standard_error.square().sum(1).sqrt()

    @property
    def probabilities(self) -> Tensor:
        """(B, K) softmax of the logits; of one logit alone, the sigmoid."""
        return LINKS["probability"](self.logits)

    @property
    def predicted(self) -> Tensor:
        """(B,) int64, the class with the largest logit."""
        return self.logits.argmax(-1)

    def targets(self, target: int | Tensor | None = None) -> Tensor:
        """The class per image that `target` means, checked against what is explained.

        Args:
            target: a class, or (B,) classes; None for the target explained, or the predicted class where all are.

        Returns:
            int64 (B,).

        Raises:
            ValueError: for a class that does not exist or that this explanation does not hold.
        """
        batch, classes = self.logits.shape
        if target is None:
            return self.predicted if self.target is None else self.target
        wanted = check_classes("Explanation", "target", target, batch, classes).to(self.logits.device)
        if self.target is not None and not torch.equal(wanted, self.target.to(wanted.device)):
            remedy = 'Explain every class with model.explain(images, target="all").'
            fail("Explanation", "target", "the one that was explained", target, remedy)
        return wanted

    def values_for(self, target: int | Tensor | None = None) -> Tensor:
        """(B, P) the Shapley values of one class per image; `target` as in `targets`.

        Example:
            >>> model.explain(images, target="all").values_for(3).shape
            torch.Size([4, 9])
        """
        chosen = self.targets(target).to(self.values.device)
        if self.target is not None:
            return self.values
        return self.values.gather(2, chosen.view(-1, 1, 1).expand(-1, self.values.shape[1], 1)).squeeze(2)

    def heatmap(
        self,
        size: int | tuple[int, int] | None = None,
        target: int | Tensor | None = None,
        mode: str = "nearest",
    ) -> Tensor:
        """The Shapley values of one class per image, laid out as a picture.

        Every entry is the Shapley value of a whole patch, in logits: on the grid they sum to
        logits[target] − null[target]; resized they do not sum to anything. `Attribution` spreads each value over
        its pixels instead, so that its sum is kept.

        Args:
            size: (H, W) of the result, one number for a square, for the whole image: 0 where the grid does not reach;
                None for the grid itself.
            target: a class, or (B,) classes; None for the target explained, or the predicted class where all are.
            mode: "nearest" gives each pixel its patch's value, "bilinear" blends between the centres of patches.

        Returns:
            (B, h, w) where size is None, else (B, H, W).

        Raises:
            ValueError: for a target that is not explained, or an unknown size or mode.

        Example:
            >>> model.explain(images).heatmap(size=48).shape
            torch.Size([4, 48, 48])
        """
        if mode not in ("nearest", "bilinear"):
            fail("Explanation.heatmap", "mode", '"nearest" or "bilinear"', mode)
        maps = self.values_for(target).unflatten(1, self.grid)
        if size is None:
            return maps
        shape: tuple[Any, ...] = (size, size) if isinstance(size, Integral) else tuple(size)  # type: ignore[arg-type]
        if len(shape) != 2 or not all(isinstance(side, Integral) and int(side) > 0 for side in shape):
            fail("Explanation.heatmap", "size", "a positive whole number, (H, W) or None", size)
        height, width = self.seen_pixels(shape)
        seen = functional.interpolate(maps.unsqueeze(1), size=(height, width), mode=mode).squeeze(1)
        return functional.pad(seen, (0, shape[1] - width, 0, shape[0] - height))

    def seen_pixels(self, size: Sequence[int]) -> tuple[int, int]:
        """(height, width) of the part of an image of size (H, W), from the top left, that the grid covers."""
        return seen_pixels(self.seen, size)

    def efficiency_gap(self) -> float:
        """The largest |Σ_p values + null − logit| over images and classes explained, relative.

        Relative to the largest |logit| or |null| of the image over all classes; 0 for an empty batch.
        """
        return relative_efficiency_gap(self.values, self.logits, self.null, self.target)

    def plot(
        self,
        images: Tensor | None = None,
        index: int = 0,
        target: int | None = None,
        ax: Axes | None = None,
        classes: Sequence[str] | None = None,
        limit: float | None = None,
    ) -> tuple[Figure, Axes]:
        """Draws the heat map of one image, over the image where it is given, with a colour bar.

        Args:
            images: (B, C, H, W) the images explained, C = 1 or 3, in any unit: stretched to their own range.
            index: which image of the batch.
            target: a class; None for the target explained, or the predicted class where all are.
            ax: where to draw; None makes a figure.
            classes: K names for the title.
            limit: the value at the ends of the colour scale, which is symmetric about 0; None for the largest drawn.

        Returns:
            (figure, axes).

        Raises:
            ModuleNotFoundError: where matplotlib is not installed.
            ValueError: for an image, a target or names that do not fit the explanation.

        Example:
            >>> figure, ax = model.explain(images).plot(images, index=1)
            >>> figure.savefig("explanation.png")
        """
        figures = pyplot()
        check_drawing("Explanation.plot", images, len(self), self.logits.shape[1], classes)
        if limit is not None and not (isinstance(limit, Real) and 0 < float(limit) < float("inf")):
            fail("Explanation.plot", "limit", "a finite number above 0, or None", limit)
        one = self[index]
        chosen = int(one.targets(target))
        if ax is None:
            _, ax = figures.subplots(figsize=(4.2, 3.6), dpi=150, layout="constrained")
        picture = None if images is None else displayable(images[index])
        heat = one.heatmap(target=chosen)[0]
        shown = one.heatmap(None if picture is None else picture.shape[:2], chosen)[0]
        drawn = draw_heatmap(ax, shown, picture, end_of_scale(heat) if limit is None else float(limit))
        ax.set_title(one.title(chosen, classes), fontsize=10)
        figure: Any = ax.get_figure()
        label_bar(figure.colorbar(drawn, ax=ax, fraction=0.046, pad=0.03), f"Shapley value ({one.unit})")
        return figure, ax

    def title(self, target: int, classes: Sequence[str] | None = None) -> str:
        """The name of a class and its probability, of the first image."""
        name = str(target) if classes is None else str(classes[target])
        probability = float(self.probabilities[0, target])
        title = f"{name} · {'<1%' if probability < 0.01 else f'{probability:.0%}'}"
        if self.standard_error is not None:
            error = self.standard_error[0] if self.target is not None else self.standard_error[0, :, target]
            title = f"{title} · ± {float(error.square().mean().sqrt()):.2g} a patch"
        return f"{title}\n(untrained explainer)" if self.untrained else title

    def as_shap(self, images: Tensor | None = None, classes: Sequence[str] | None = None) -> Any:
        """As a `shap.Explanation`, for shap's plots: of patches, or of the pixels of images (B, C, H, W).

        `classes` are K names, used where every class is explained. Needs the package shap.

        Example:
            >>> model.explain(images).as_shap(images).values.shape
            (4, 48, 48, 3)
        """
        return as_shap(self.values, self.null, self.target, self.grid, self.seen, images, classes)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file; the file at `path` is never half written.

        Args:
            path: the file; its folder must exist.

        Example:
            >>> explanation = model.explain(images)
            >>> explanation.save("explanation.safetensors")
            >>> torch.equal(fv.Explanation.load("explanation.safetensors").values, explanation.values)
            True
        """
        facts = {
            "grid": f"{self.grid[0]}x{self.grid[1]}",
            "unit": self.unit,
            "seen": f"{self.seen[0]!r} {self.seen[1]!r}",
            "untrained": str(self.untrained),
            "evaluations": str(self.evaluations),
        }
        write(path, {name: getattr(self, name) for name in _TENSORS}, facts)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Explanation:
        """Reads what `save` wrote, onto the CPU, as an explanation of the unit that was saved.

        Args:
            path: the file.

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: when the file is damaged, or is not an explanation.
        """
        return read(path, cls._from_file)

    @classmethod
    def _from_file(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> Explanation:
        rows, columns = facts["grid"].split("x")
        height, width = facts.get("seen", "1.0 1.0").split()
        return _BY_UNIT[facts.get("unit", cls.unit)](
            tensors["values"],
            tensors["logits"],
            tensors.get("target"),
            (int(rows), int(columns)),
            tensors["null"],
            seen=(float(height), float(width)),
            untrained=facts.get("untrained") == "True",
            standard_error=tensors.get("standard_error"),
            evaluations=int(facts.get("evaluations", "0")),
        )


class ProbabilityExplanation(Explanation):
    """An explanation whose `values`, `logits` and `null` are probabilities."""

    unit = "probabilities"

    @property
    def probabilities(self) -> Tensor:
        """(B, K) v(N)."""
        return self.logits


class LogProbabilityExplanation(Explanation):
    """An explanation whose `values`, `logits` and `null` are log-probabilities."""

    unit = "log-probabilities"

    @property
    def probabilities(self) -> Tensor:
        """(B, K) exponential of v(N)."""
        return self.logits.exp()


_BY_UNIT = {kind.unit: kind for kind in (Explanation, ProbabilityExplanation, LogProbabilityExplanation)}


def relative_efficiency_gap(values: Tensor, logits: Tensor, null: Tensor, target: Tensor | None = None) -> float:
    """Largest |Σ_p φ + null − logit| of the classes explained, relative to the image's largest |logit| or |null|.

    Args:
        values: (B, P) of the classes in `target`, or (B, P, K) of all where `target` is None.
        logits: (B, K).
        null: (K,) or (B, K).
        target (int64): (B,) or None.

    Returns:
        The gap, computed in float64; 0 for an empty batch.
    """
    if logits.numel() == 0:
        return 0.0
    logits, null = logits.detach().double(), null.detach().double()
    scale = logits.abs().maximum(null.abs()).amax(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    expected = logits - null
    if target is not None:
        expected = expected.gather(1, target.unsqueeze(1))
    sums = values.detach().double().sum(1).reshape(expected.shape)
    return float(((sums - expected).abs() / scale).max())
