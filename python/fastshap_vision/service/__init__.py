"""A model that explains its predictions over HTTP."""

from .limits import Limits

try:
    from .app import create_app
except ModuleNotFoundError as error:
    if error.name not in ("anyio", "fastapi", "pydantic", "starlette"):
        raise
    raise ModuleNotFoundError(
        'Serving a model needs fastapi. Install it: pip install "fastshap-kernels[serve]".', name=error.name
    ) from error

__all__ = ["Limits", "create_app"]
