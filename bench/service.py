"""What a served explanation costs, and what it withstands: python -m bench.service.

A service in a process of its own, on loopback, of a network of timm with random weights, its head as the recipe makes
it. Three parts:

    latency    milliseconds of a request with one JPEG of 500 x 375 pixels, beside the network's own forward pass of one
               image ready in memory; by turns, medians; and requests a second by wrk, where it is installed
    malformed  requests that are wrong: damaged files, other files, wrong addresses, no HTTP at all
    memory     of the service, after each tenth of many requests: what it grows by in the second half of them, when the
               allocator and the fonts have what they keep
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import io
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import timm
import torch
from PIL import Image

import fastshap_vision as fv
from bench.lib import machine
from bench.lib.results import RESULTS, Results
from bench.offline import write_images

NETWORKS = ("vit_small_patch16_224", "vit_base_patch16_224", "resnet50")
SMALL = ("test_vit", "test_vit")
#: A request's time, of the network's own forward pass.
MOST = 1.3
CONNECTIONS = (1, 8, 32)


def network_of(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name).eval()


def serve(name: str, port: int) -> None:
    import uvicorn

    from fastshap_vision.service import create_app

    model = fv.convert(network_of(name), **fv.recipe.MODEL).eval()
    torch.nn.init.normal_(model.head.shares.weight, std=0.01)  # one that was trained
    uvicorn.run(create_app(model), port=port, log_level="critical")


@contextlib.contextmanager
def served(name: str) -> Iterator[tuple[int, psutil.Process]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-m", "bench.service", "--serve", name, str(port)])
    try:
        until = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError):
                status, _ = ask(port, "GET", "/health")
                assert status == 200
                break
            assert process.poll() is None, "the service has ended"
            assert time.monotonic() < until, "the service does not start"
            time.sleep(0.1)
        yield port, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(20)


def ask(port: int, method: str, address: str, body: bytes = b"") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, address, body)
        found = connection.getresponse()
        return found.status, found.read()
    finally:
        connection.close()


def photograph() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), 1)
        return next(Path(folder).iterdir()).read_bytes()


def measure_latency(name: str, turns: int) -> dict[str, Any]:
    network, body, found = network_of(name), photograph(), {"forward": [], "request": []}
    image = torch.randn(1, 3, 224, 224)

    @torch.inference_mode()
    def forward(_: int) -> None:
        network(image)

    def request(port: int) -> None:
        assert ask(port, "POST", "/explain", body)[0] == 200

    with served(name) as (port, _):
        calls = {"forward": forward, "request": request}
        for turn in range(turns + 3):
            for side in list(calls)[:: -1 if turn % 2 else 1]:
                begun = time.perf_counter()
                calls[side](port)
                if turn >= 3:  # the first ones warm up
                    found[side].append(time.perf_counter() - begun)
        load = {str(count): rate for count in CONNECTIONS if (rate := requests_a_second(port, body, count))}
    medians = {side: statistics.median(seconds) for side, seconds in found.items()}
    ratio = medians["request"] / medians["forward"]
    row = {"part": "latency", "network": name, "turns": turns}
    row |= {f"{side}_ms": round(1e3 * seconds, 2) for side, seconds in medians.items()}
    return row | {"ratio": round(ratio, 3), "met": ratio <= MOST, "requests_s_by_connections": load}


def requests_a_second(port: int, body: bytes, connections: int) -> float | None:
    if shutil.which("wrk") is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        image, script = Path(folder) / "image.jpg", Path(folder) / "post.lua"
        image.write_bytes(body)
        script.write_text(
            f'wrk.method = "POST"\nlocal file = io.open("{image}", "rb")\nwrk.body = file:read("*a")\nfile:close()\n'
        )
        command = ["wrk", "-t1", f"-c{connections}", "-d5s", "--timeout", "30s", "-s", str(script)]
        done = subprocess.run(
            [*command, f"http://127.0.0.1:{port}/explain"], capture_output=True, text=True, check=True
        )
    assert "Non-2xx" not in done.stdout, done.stdout
    return float(done.stdout.split("Requests/sec:")[1].split()[0])


class Malformed:
    """Requests that are wrong, or damaged so that most of them are; the same ones for a seed."""

    FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
    OTHERS = (
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        b"%PDF-1.7\n",
        b"<svg/>",
        b"\x89HDF\r\n\x1a\n",
        b"GRIB",
        b"PK\x03\x04",
        b"\0",
    )
    ADDRESSES = (
        "/explain?target=-1",
        "/explain?top=0",
        "/explain?top=9" * 2,
        "/explain?x=1",
        "/%00",
        "/..",
        "/explain/",
    )
    NO_HTTP = (
        b"GET",
        b"\r\n\r\n",
        b"POST /explain HTTP/9.9\r\n\r\n",
        b"POST /explain HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
    )

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        pixels = np.random.default_rng(seed).integers(0, 256, (40, 56, 3), dtype=np.uint8)
        self.files = []
        for name in self.FORMATS:
            written = io.BytesIO()
            Image.fromarray(pixels).save(written, name)
            self.files.append(written.getvalue())

    def send(self, port: int) -> int:
        """The status of the answer; 0 where what is no HTTP is answered by the end of the connection."""
        kind = self.random.randrange(8)
        if kind < 4:
            return ask(port, "POST", "/explain", self._damaged())[0]
        if kind == 4:
            body = self.random.choice(self.OTHERS) + self.random.randbytes(self.random.randrange(200))
            return ask(port, "POST", "/explain", body)[0]
        if kind == 5:
            return ask(port, "POST", self.random.choice(self.ADDRESSES), self.random.choice(self.files))[0]
        if kind == 6:
            method = self.random.choice(("GET", "PUT", "DELETE", "PATCH", "TRACE", "HACK"))
            return ask(port, method, "/explain", self.random.choice(self.files))[0]
        return self._no_http(port)

    def _damaged(self) -> bytes:
        found = bytearray(self.random.choice(self.files))
        for _ in range(self.random.randrange(1, 20)):
            found[self.random.randrange(min(len(found), self.random.choice((64, 1 << 20))))] = self.random.randrange(
                256
            )
        if self.random.random() < 0.5:
            del found[self.random.randrange(len(found)) :]
        return bytes(found)

    def _no_http(self, port: int) -> int:
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(self.random.choice(self.NO_HTTP) + self.random.randbytes(self.random.randrange(50)))
            connection.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                answer = connection.recv(100)
                return int(answer.split()[1]) if answer.startswith(b"HTTP/1.1 ") else 0
        return 0


def measure_malformed(requests: int, seed: int = 0) -> dict[str, Any]:
    malformed, statuses = Malformed(seed), Counter()
    with served(SMALL[0]) as (port, _):
        before = ask(port, "POST", "/explain", photograph())
        for _ in range(requests):
            statuses[malformed.send(port)] += 1
        same = ask(port, "POST", "/explain", photograph()) == before
    faults = sum(count for status, count in statuses.items() if status >= 500)
    found = {str(status): statuses[status] for status in sorted(statuses)}
    row = {"part": "malformed", "network": SMALL[0], "requests": requests, "statuses": found, "faults": faults}
    return row | {"same_answer_afterwards": same, "met": faults == 0 and same}


def measure_memory(requests: int) -> dict[str, Any]:
    body, megabytes = photograph(), []
    with served(SMALL[0]) as (port, process):
        for number in range(requests):
            address = "/explain?format=png" if number % 100 == 0 else "/explain"
            assert ask(port, "POST", address, body)[0] == 200
            if (number + 1) % (requests // 10) == 0:
                megabytes.append(round(process.memory_info().rss / 1e6, 1))
    grown = megabytes[-1] - megabytes[4]
    row = {"part": "memory", "network": SMALL[0], "requests": requests, "megabytes": megabytes}
    return row | {"grown_mb": round(grown, 1), "met": grown <= 0.01 * megabytes[4]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=NETWORKS, help="of timm, for the latency")
    parser.add_argument("--turns", type=int, default=60)
    parser.add_argument("--malformed", type=int, default=10_000, help="requests")
    parser.add_argument("--memory", type=int, default=20_000, help="requests, at least 10")
    parser.add_argument("--output", type=Path, default=RESULTS / "service.json")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve[0], int(options.serve[1]))
        return
    results = Results(options.output, ("part", "network"))
    parts = [lambda name=name: measure_latency(name, options.turns) for name in options.networks]
    parts += [lambda: measure_malformed(options.malformed), lambda: measure_memory(options.memory)]
    for part in parts:
        row = part()
        print(row, flush=True)
        results.replace([row])
        results.content = machine.header() | {"most": MOST, "rows": results.rows}
        results.write()


if __name__ == "__main__":
    main()
