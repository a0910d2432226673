"""A data set and its mirror images."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.data import Dataset, Subset


class WithMirrorImages(Dataset):
    """Every image of a dataset and then, as many again, its mirror image.

    It makes more of the images that `record_coalitions` takes, which may not change from one reading to the next. Not
    for images that are never seen mirrored, such as writing.

    Args:
        data: a dataset of (image, label), images (C, H, W).

    Raises:
        TypeError: for what is no such dataset; for its items on reading.

    Example:
        >>> mirrored = fv.WithMirrorImages(data)
        >>> len(mirrored), torch.equal(mirrored[4][0], images[0].flip(-1))
        (8, True)
    """

    def __init__(self, data: Any) -> None:
        if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
            raise TypeError(
                f"WithMirrorImages: argument `data` must be a dataset of (image, label), with a length, but it is a "
                f"{type(data).__name__}."
            )
        self.data = data

    @property
    def classes(self) -> Any:
        return getattr(self.data, "classes", None)

    def __len__(self) -> int:
        return 2 * len(self.data)

    def __getitem__(self, row: int) -> tuple[Tensor, Any]:
        return self.__getitems__([range(len(self))[row]])[0]

    def __getitems__(self, rows: list[int]) -> list[tuple[Tensor, Any]]:
        """A batch at once, as torch's DataLoader takes it."""
        count = len(self.data)
        items = Subset(self.data, [row % count for row in rows]).__getitems__(list(range(len(rows))))
        wrong = [item for item in items if not (isinstance(item, (tuple, list)) and len(item) == 2)]
        wrong = wrong or [item[0] for item in items if not isinstance(item[0], Tensor)]
        if wrong:
            raise TypeError(
                "WithMirrorImages: argument `data` must hold (image, label), each image a tensor (C, H, W), but it "
                f"holds a {type(wrong[0]).__name__}. Let the dataset make tensors, as fv.load_dataset does."
            )
        return [
            (image.flip(-1) if row >= count else image, label) for row, (image, label) in zip(rows, items, strict=True)
        ]
