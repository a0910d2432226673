"""The service: an image is posted, its prediction and the explanation of it come back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Annotated, Any, Literal

import anyio
from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import ClientDisconnect

from ..images.preprocessing import Preprocessing
from ..models.self_explaining import SelfExplainingClassifier
from .explainer import FORMATS, Explainer, Refused
from .limits import Limits


class Question(BaseModel):
    """What the address asks of an image."""

    model_config = ConfigDict(extra="forbid")

    target: str | None = Field(None, description="the class to explain, its name or number (default: the predicted)")
    top: int = Field(5, ge=1, description="how many of the likeliest classes are listed")
    format: Literal["json", "png"] = "json"


def create_app(
    model: SelfExplainingClassifier,
    *,
    classes: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    batch_size: int = 16,
    limits: Limits | None = None,
) -> FastAPI:
    """An application that serves a model's explanations: to be run by uvicorn, or mounted into another.

    `POST /explain` takes the bytes of an image file, `GET /` says what is served and how to ask, `GET /health` whether
    it runs. Nothing is read from the file system, or written to it. Needs the extra `serve`.

    Args:
        model: on the device where it is to compute; it is put in evaluation mode.
        classes: K names.
        preprocessing: how pictures become inputs; None for the model's own.
        batch_size: images at once, at most. An image that comes alone does not wait for others.
        limits: None for those of `Limits()`.

    Raises:
        ValueError: for names that are not as many as the model's classes, preprocessing to inputs that are not the
            model's, or a model of images that no file holds.

    Example:
        >>> from fastshap_vision.service import create_app
        >>> app = create_app(model)
        >>> "/explain" in app.openapi()["paths"]
        True
    """
    limits = limits or Limits()
    explainer = Explainer(model, classes, preprocessing, batch_size, limits.pixels)
    active = 0

    # No pages of documentation: they load scripts from elsewhere.
    app = FastAPI(title="fastshap", version=version("fastshap-kernels"), docs_url=None, redoc_url=None)

    @app.get("/")
    async def about() -> dict[str, Any]:
        return {
            "model": model.config["model_name"],
            "classes": model.num_classes if explainer.classes is None else explainer.classes,
            "input_size": explainer.preprocessing.input_size,
            "grid": model.grid,
            "untrained": model.is_untrained,
            "formats": FORMATS,
            "limits": asdict(limits),
            "ask": "curl --data-binary @image.jpg 'http://HOST/explain?target=CLASS&top=5&format=json'",
        }

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/explain", responses={code: {} for code in (400, 408, 413, 415, 503)})
    async def explain(request: Request, question: Annotated[Question, Query()]) -> Response:
        nonlocal active
        if active >= limits.requests:
            raise HTTPException(503, "too many requests at once. Try again.", {"Retry-After": "1"})
        active, body = active + 1, None
        try:
            with anyio.fail_after(limits.seconds):
                target = explainer.target(question.target)
                body = await _body(request, limits.bytes)
                found = await explainer.answer(body, target, question.top, question.format == "png")
        except Refused as refused:
            raise HTTPException(refused.status, refused.reason) from None
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        except TimeoutError:
            if body is None:
                raise HTTPException(408, f"the body did not come within {limits.seconds:g} seconds.") from None
            raise HTTPException(503, f"no answer within {limits.seconds:g} seconds. Try again.") from None
        finally:
            active -= 1
        return Response(found, media_type="image/png") if isinstance(found, bytes) else JSONResponse(found)

    return app


async def _body(request: Request, most: int) -> bytes:
    found = bytearray()
    async for part in request.stream():
        found += part
        if len(found) > most:
            raise Refused(413, f"the body has more than {most} bytes. Send a smaller file.")
    if not found:
        raise Refused(400, "the body is empty. Send a file as it is: curl --data-binary @image.jpg")
    return bytes(found)
