"""From the bytes of an image to what the model says about it."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from fastshap_kernels._checks import check_count, fail

from ..explanations.explanation import Explanation
from ..images.decode import TooManyPixels, decode
from ..images.preprocessing import Preprocessing
from ..models.self_explaining import SelfExplainingClassifier
from .answers import as_json, as_png
from .batches import Batches

#: What Pillow decodes by itself. Of its other formats, some start programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
#: Images decoded at once: each takes far more memory than its file.
DECODERS = 2


class Refused(Exception):
    """A request that can't be answered: the status of the answer, and the reason for it."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class Explainer:
    """A model, how its inputs are made, and what its classes are called. Threads of its own do the work."""

    def __init__(
        self,
        model: SelfExplainingClassifier,
        classes: Sequence[str] | None,
        preprocessing: Preprocessing | None,
        batch_size: int,
        pixels: int,
    ) -> None:
        preprocessing = model.preprocessing if preprocessing is None else preprocessing
        if preprocessing is None:
            raise ValueError("create_app: the model is of images that are neither greyscale nor RGB, as no file is.")
        if preprocessing.input_size != model.game.input_size:
            fail("create_app", "preprocessing", f"one to {model.game.input_size}", preprocessing)
        if classes is not None and len(classes) != model.num_classes:
            fail("create_app", "classes", f"{model.num_classes} names, one for each of the model's classes", classes)
        check_count("create_app", "batch_size", batch_size, 1, 2**16)
        self.model, self.preprocessing, self._pixels = model.eval(), preprocessing, pixels
        self.classes = None if classes is None else [str(name) for name in classes]
        self._transform, self._device = preprocessing.transform(), next(model.parameters()).device
        self._decoders, self._painter = ThreadPoolExecutor(DECODERS, "decode"), ThreadPoolExecutor(1, "draw")
        self._batches = Batches(self._explain, batch_size)

    def target(self, name: str | None) -> int | None:
        """A class by its name or number; None for the predicted one.

        Raises:
            Refused: 422, where there is no such class.
        """
        if name is None:
            return None
        if self.classes is not None and name in self.classes:
            return self.classes.index(name)
        if name.isascii() and name.isdecimal() and len(name) < 10 and int(name) < self.model.num_classes:
            return int(name)
        named = "" if self.classes is None else ", or its name: GET / lists them"
        raise Refused(422, f"target: expected a class from 0 to {self.model.num_classes - 1}{named}.")

    async def answer(self, body: bytes, target: int | None, top: int, picture: bool) -> dict[str, Any] | bytes:
        """JSON, or the bytes of a picture.

        Raises:
            Refused: for what is no image, or too large a one.
        """
        run = asyncio.get_running_loop().run_in_executor
        image = await run(self._decoders, self._decode, body)
        explanation = await self._batches.ask((image, target))
        if picture:
            pixels = self.preprocessing.restore(image)
            return await run(self._painter, as_png, explanation, pixels, self.classes)
        return as_json(explanation, self.classes, top)

    def _decode(self, body: bytes) -> Tensor:
        """(1, C, H, W), normalised."""
        try:
            image = decode(io.BytesIO(body), self.preprocessing.mode, formats=FORMATS, pixels=self._pixels)
        except TooManyPixels as error:
            raise Refused(413, f"the image is too large: {error}. Send a smaller one.") from None
        except ValueError as error:
            raise Refused(415, f"the body is no image that can be read ({', '.join(FORMATS)}): {error}.") from None
        return self._transform(image).unsqueeze(0)

    def _explain(self, questions: Sequence[tuple[Tensor, int | None]]) -> list[Explanation]:
        """Those that name a class in one pass, the others in another."""
        found: dict[int, Explanation] = {}
        for named in (False, True):
            rows = [row for row, (_, target) in enumerate(questions) if (target is not None) == named]
            if rows:
                images = torch.cat([questions[row][0] for row in rows]).to(self._device)
                targets = [questions[row][1] for row in rows]
                explanation = self.model.explain(images, torch.tensor(targets) if named else None).cpu()
                found |= {row: explanation[place] for place, row in enumerate(rows)}
        return [found[row] for row in range(len(questions))]
