"""Any image classifier as a game: the pixels of absent patches are replaced by a baseline."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastshap_kernels import mask_patches
from fastshap_kernels._checks import check_count, check_tensor, fail

from .._checks import check_choice
from ..explanations.link import LINKS
from .coalitions import Coalitions, coalitions_of

BASELINES = ("mean", "black", "blur")
_BLUR_SIZE, _BLUR_DEVIATION = 11, 5.0


class MaskedImageGame(nn.Module):
    """The game v_x(S) = model(x with the patches outside S replaced by a baseline).

    Args:
        model: images (B, C, H, W) to logits (B, K); a module or any callable.
        grid: (h, w), patches per column and per row; h divides H, w divides W. P = h·w players, row by row.
        baseline: what absent patches become, in the unit of the images:
            "mean": 0, the mean colour of images normalised to mean 0;
            "black": (0 − mean) / std, which normalisation makes of black pixels;
            "blur": the image itself, blurred by the 11 x 11 kernel of standard deviation 5 of RISE, with the mean
            colour beyond its edges;
            or a tensor, (C,) or (1, C, H, W) for all images, (B, C, H, W) for each its own.
        mean, std: of the normalisation, per channel, for pixels in [0, 1]; needed by "black".
        batch: images that the model sees at once, at most.
        link: what the model returns, where it is not "logit": "probability" or "log_probability".

    Attributes:
        grid, players: (h, w) and P.

    Raises:
        ValueError: for an unknown or impossible baseline, grid or batch.

    Source: Petsiuk, Das, Saenko, RISE, BMVC 2018 (deletion to the mean colour, insertion from the blur).

    Example:
        >>> classifier = timm.create_model("test_resnet", num_classes=10).eval()
        >>> game = fv.MaskedImageGame(classifier, grid=(4, 4), baseline="blur")
        >>> fv.kernel_shap_values(game, images[:1], coalitions=128).phi.shape
        torch.Size([1, 16, 10])
    """

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        grid: tuple[int, int],
        baseline: str | Tensor = "mean",
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        batch: int = 256,
        link: str = "logit",
    ) -> None:
        super().__init__()
        check_choice("link", link, tuple(LINKS))
        self.link = link
        if not isinstance(grid, tuple | list) or len(grid) != 2:
            fail("MaskedImageGame", "grid", "two positive whole numbers (h, w)", grid)
        rows, columns = (check_count("MaskedImageGame", "grid", side, 1, 4096) for side in grid)
        if not callable(model):
            fail("MaskedImageGame", "model", "a module or a function of images (B, C, H, W)", model)
        self.model = model
        self.grid, self.players = (rows, columns), rows * columns
        self.batch = check_count("MaskedImageGame", "batch", batch, 1, 2**31 - 1)
        self.blurs = False
        colours = [None if n is None else _numbers(name, n) for name, n in (("mean", mean), ("std", std))]
        self.fixed: Tensor | None
        self.register_buffer("fixed", None, persistent=False)
        if isinstance(baseline, Tensor):
            shape = "(C,), (1, C, H, W) or (B, C, H, W)"
            check_tensor(
                "MaskedImageGame", "baseline", baseline, shape, baseline.ndim if baseline.ndim in (1, 4) else 1
            )
            self.fixed = baseline
        elif not isinstance(baseline, str) or baseline not in BASELINES:
            fail("MaskedImageGame", "baseline", f"one of {', '.join(map(repr, BASELINES))} or a tensor", baseline)
        elif baseline == "black":
            self.fixed = _black(*colours)
        else:
            self.blurs = baseline == "blur"

    def forward(self, images: Tensor) -> Tensor:
        """The model's output (B, K) for whole images."""
        return self.model(images)

    def coalition_values(self, images: Tensor, coalitions: Coalitions | Tensor) -> Tensor:
        """v(S) of every coalition.

        Args:
            images (floating point): (B, C, H, W), normalised as the model expects them.
            coalitions: M of every image, at least one: `Coalitions` or their bits alone, int32 (B, M, W). On the
                images' device or on the CPU.

        Returns:
            values (B, M, K). Gradients flow to the model where grad mode is on.

        Raises:
            ValueError: for images, coalitions or a baseline of the wrong shape.

        Example:
            >>> game = fv.MaskedImageGame(model, grid=(4, 4))
            >>> game.coalition_values(images, fk.sample_coalitions(4, 2, 16, seed=0)).shape
            torch.Size([4, 2, 10])
        """
        check_tensor("MaskedImageGame", "images", images, "(B, C, H, W)", 4)
        bits = coalitions_of(images, coalitions, self.players, "MaskedImageGame", or_on_cpu=True).bits.to(images.device)
        if not bits.numel():
            fail("MaskedImageGame", "coalitions", "at least one coalition of one image", bits)
        baseline = self._baseline(images)
        owners = torch.arange(len(images), device=images.device).repeat_interleave(bits.shape[1])
        parts = []
        for owner, part in zip(owners.split(self.batch), bits.flatten(0, 1).split(self.batch), strict=True):
            absent = baseline[owner] if isinstance(baseline, Tensor) and baseline.ndim == 4 else baseline
            logits = self.model(mask_patches(images[owner], part.unsqueeze(1), self.grid, absent))
            if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(part):
                fail(
                    "MaskedImageGame", "model", f"a function from {len(part)} images to logits ({len(part)}, K)", logits
                )
            parts.append(logits)
        return torch.cat(parts).unflatten(0, bits.shape[:2])

    def _baseline(self, images: Tensor) -> float | Tensor:
        """A number, a colour (C,), a picture (C, H, W) for all images, or pictures (B, C, H, W)."""
        if self.blurs:
            return _blur(images)
        if self.fixed is None:
            return 0.0
        fixed = self.fixed.to(images)
        shape = tuple(images.shape)
        if fixed.shape == shape[1:2]:
            return fixed
        if fixed.shape == (1, *shape[1:]):
            return fixed[0]
        if fixed.shape != shape:
            expected = f"for {shape[1]} channels: ({shape[1]},), {(1, *shape[1:])} or {shape}"
            fail("MaskedImageGame", "baseline", expected, fixed, 'Of "black", `mean` and `std` have the channels.')
        return fixed


def _black(mean: Tensor | None, std: Tensor | None) -> Tensor:
    """(C,): what normalisation makes of black."""
    if mean is None or std is None:
        fail("MaskedImageGame", "mean", 'given, and `std` too, for baseline="black"', mean)
    if mean.shape != std.shape or not bool((std > 0).all()):
        fail("MaskedImageGame", "std", "as many positive numbers as `mean` has", std)
    return -mean / std


def _numbers(argument: str, numbers: Sequence[float]) -> Tensor:
    """float64 (C,), finite."""
    try:
        channels = torch.as_tensor(numbers, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        fail("MaskedImageGame", argument, "a number for each channel", numbers)
    if channels.ndim != 1 or not channels.isfinite().all():
        fail("MaskedImageGame", argument, "a finite number for each channel", numbers)
    return channels


def _blur(images: Tensor) -> Tensor:
    """RISE's kernel is what a Gaussian filter, reflected at the borders, makes of a dot in an 11 x 11 picture: a
    Gaussian wrapped around those eleven pixels."""
    distance = torch.arange(-4 * _BLUR_DEVIATION, 4 * _BLUR_DEVIATION + 1, dtype=torch.float64)
    gaussian = (-0.5 * (distance / _BLUR_DEVIATION).square()).exp()
    wrapped = (distance.long() + _BLUR_SIZE // 2) % _BLUR_SIZE
    kernel = gaussian.new_zeros(_BLUR_SIZE).index_add(0, wrapped, gaussian / gaussian.sum()).to(images)
    channels = images.shape[1]
    rows = kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1)
    with torch.autocast(images.device.type, enabled=False):  # the game is the same whatever the model computes in
        down = functional.conv2d(images, rows, padding=(_BLUR_SIZE // 2, 0), groups=channels)
        return functional.conv2d(down, rows.transpose(2, 3), padding=(0, _BLUR_SIZE // 2), groups=channels)
