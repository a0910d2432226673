"""fastshap serve: a run's model over HTTP."""

from __future__ import annotations

import argparse
import errno
import socket

from ..training.run_folder import Run


def serve(options: argparse.Namespace) -> None:
    """Answers requests until it is interrupted."""
    from ..service import Limits, create_app

    try:
        import uvicorn
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'Serving needs uvicorn. Install it: pip install "fastshap-kernels[serve]".'
        ) from error
    limits = Limits(options.max_bytes, options.max_pixels, options.max_seconds, options.max_requests)
    with _listen(options.host, options.port) as listening:
        run = Run.read(options.checkpoint, options.device)
        app = create_app(
            run.model,
            classes=run.classes,
            preprocessing=run.preprocessing,
            batch_size=options.batch_size,
            limits=limits,
        )
        print(f"explaining images at http://{options.host}:{options.port}", flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run([listening])


def _listen(host: str, port: int) -> socket.socket:
    """Before the model is loaded: the address is this machine's, and free."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        taken = "it is in use" if error.errno == errno.EADDRINUSE else str(error)
        raise ValueError(f"argument --port: can't listen on {host}:{port}: {taken}. Choose another.") from error
