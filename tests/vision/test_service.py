"""The service: what it answers, what it refuses, and that nothing waits for ever."""

import asyncio
import importlib
import io
import json
import re
import socket
import struct
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastshap_vision as fv

pytest.importorskip("fastapi")
from fastapi.testclient import TestClient

from fastshap_vision.cli.main import main
from fastshap_vision.service import Limits, create_app
from fastshap_vision.service.batches import Batches

CLASSES = ("ant", "bee", "cow", "dog")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2}
    found = fv.SelfExplainingClassifier("vit_tiny_patch16_224", 4, img_size=48, model_kwargs=sizes)
    for weight in found.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return found.eval()


def client_of(model, **options):
    return TestClient(create_app(model, classes=CLASSES, **options), raise_server_exceptions=False)


@pytest.fixture(scope="module")
def client(model):
    with client_of(model, limits=Limits(bytes=200_000, pixels=100_000)) as found:
        yield found


def picture(size=(64, 52), file_format="PNG", mode="RGB", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    written = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(written, file_format)
    return written.getvalue()


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_the_answer_is_the_models_explanation(client, model, file_format):
    body = picture(file_format=file_format)
    found = client.post("/explain", content=body).json()
    expected = model.explain(Image.open(io.BytesIO(body)).convert("RGB"))
    torch.testing.assert_close(torch.tensor(found["values"]), expected.values[0].view(3, 3), rtol=1e-5, atol=1e-6)
    predicted = int(expected.predicted)
    assert found["predicted"] == found["explained"] == found["top"][0]
    assert found["predicted"]["index"] == predicted
    assert found["predicted"]["class"] == CLASSES[predicted]
    assert found["predicted"]["probability"] == pytest.approx(float(expected.probabilities[0, predicted]), rel=1e-5)
    gap = sum(map(sum, found["values"])) + found["null"] - found["predicted"]["logit"]
    assert abs(gap) < 1e-5
    assert found["grid"] == [3, 3]
    assert found["expected_error"] is found["standard_error"] is None
    assert found["untrained"] == expected.untrained


def test_a_class_is_named_or_numbered(client):
    by_name, by_number = (client.post(f"/explain?target={name}&top=2", content=picture()).json() for name in ("cow", 2))
    assert by_name == by_number
    assert by_name["explained"]["class"] == "cow"
    assert len(by_name["top"]) == 2


def test_a_calibrated_model_says_how_far_to_believe_it(model):
    images = torch.randn(8, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    model.calibrate(images, coalitions=16)
    try:
        with client_of(model) as client:
            found = client.post("/explain", content=picture()).json()
    finally:
        model.calibration = None
    errors = torch.tensor(found["standard_error"])
    assert errors.shape == (3, 3)
    assert found["expected_error"] == pytest.approx(float(errors.square().sum().sqrt()), rel=1e-5)
    assert found["expected_error"] > 0


def test_a_picture_is_drawn(client):
    found = client.post("/explain?format=png&target=bee", content=picture())
    assert found.headers["content-type"] == "image/png"
    with Image.open(io.BytesIO(found.content)) as image:
        assert min(image.size) > 200


def test_facts_and_health(client):
    about = client.get("/").json()
    assert about["classes"] == list(CLASSES)
    assert about["input_size"] == [3, 48, 48]
    assert about["limits"]["pixels"] == 100_000
    assert client.get("/health").json() == {"status": "ok"}


def bomb():
    """A PNG of a few hundred bytes that says it has 30 000 × 30 000 pixels."""
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    found = b"\x89PNG\r\n\x1a\n"
    for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")):
        found += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return found


@pytest.mark.parametrize(
    ("address", "body", "status", "reason"),
    [
        ("/explain", b"", 400, "the body is empty"),
        ("/explain", b"no image", 415, "Pillow knows no such format"),
        ("/explain", picture()[:700], 415, "is no image that can be read"),
        ("/explain", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 415, "Pillow knows no such format"),
        ("/explain", bomb(), 413, "the image is too large"),
        ("/explain", picture((400, 300), "JPEG"), 413, "400 × 300 pixels are more than 100000"),
        ("/explain", bytes(300_000), 413, "more than 200000 bytes"),
        ("/explain?target=4", picture(), 422, "a class from 0 to 3, or its name"),
        ("/explain?target=-1", picture(), 422, "a class from 0 to 3"),
        ("/explain?target=²", picture(), 422, "a class from 0 to 3"),
        ("/explain?top=0", picture(), 422, "greater than or equal to 1"),
        ("/explain?top=x", picture(), 422, "valid integer"),
        ("/explain?format=gif", picture(), 422, "'json' or 'png'"),
        ("/explain?taget=1", picture(), 422, "Extra inputs are not permitted"),
        ("/nothing", picture(), 404, "Not Found"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else None,
)
def test_what_is_wrong_is_said(client, address, body, status, reason):
    found = client.post(address, content=body)
    assert found.status_code == status, found.text
    assert reason in str(found.json()["detail"])


def test_a_body_that_does_not_come_is_not_waited_for(model):
    app = create_app(model, limits=Limits(seconds=0.05))
    sent = []

    async def call():
        async def receive():
            await asyncio.sleep(10)

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http"}
        await app(scope | {"path": "/explain", "query_string": b"", "headers": []}, receive, send)

    asyncio.run(call())
    assert sent[0]["status"] == 408


def test_it_can_be_mounted_and_outlives_an_event_loop(model):
    """Neither runs a lifespan of its own."""
    from fastapi import FastAPI

    outer = FastAPI()
    outer.mount("/model", create_app(model))
    client = TestClient(outer)  # a loop for each request
    assert [client.post("/model/explain", content=picture()).status_code for _ in range(3)] == [200] * 3


def test_those_beyond_the_limit_are_told_to_come_again(model, monkeypatch):
    begun, held, explain = threading.Event(), threading.Event(), model.explain

    def explain_later(*arguments):
        begun.set()
        held.wait(20)
        return explain(*arguments)

    monkeypatch.setattr(model, "explain", explain_later)
    with client_of(model, limits=Limits(requests=1)) as client:
        answers = []
        first = threading.Thread(target=lambda: answers.append(client.post("/explain", content=picture())))
        first.start()
        assert begun.wait(20)
        second = client.post("/explain", content=picture())
        held.set()
        first.join()
    assert second.status_code == 503
    assert second.headers["retry-after"] == "1"
    assert answers[0].status_code == 200


def test_a_model_that_fails_leaves_the_service_running(model, monkeypatch):
    explain, fails = model.explain, [True]
    monkeypatch.setattr(model, "explain", lambda *arguments: 1 / 0 if fails.pop() else explain(*arguments))
    fails[:] = [False, True]
    with client_of(model) as client:
        assert [client.post("/explain", content=picture()).status_code for _ in range(2)] == [500, 200]


def test_what_waits_is_answered_together_and_in_order():
    sizes = []

    def answer(questions):
        sizes.append(len(questions))
        time.sleep(0.02)
        return [question * 10 for question in questions]

    async def ask():
        batches = Batches(answer, size=4)
        given_up = asyncio.create_task(batches.ask(99))
        await asyncio.sleep(0.005)
        questions = [asyncio.create_task(batches.ask(number)) for number in range(9)]
        await asyncio.sleep(0)
        questions[3].cancel()
        found = await asyncio.gather(*questions, return_exceptions=True)
        assert await given_up == 990
        return found

    found = asyncio.run(ask())
    assert [value for number, value in enumerate(found) if number != 3] == [0, 10, 20, 40, 50, 60, 70, 80]
    assert isinstance(found[3], asyncio.CancelledError)
    assert sizes == [1, 4, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": ("a",)}, "create_app: argument `classes` must be 4 names"),
        ({"batch_size": 0}, "create_app: argument `batch_size`"),
        ({"preprocessing": fv.Preprocessing((3, 32, 32), (0.5,) * 3, (0.5,) * 3)}, "`preprocessing` must be one to"),
    ],
)
def test_bad_arguments_are_named(model, options, message):
    with pytest.raises(ValueError, match=message):
        create_app(model, **{"classes": CLASSES} | options)


@pytest.mark.parametrize(("name", "value"), [("bytes", 0), ("pixels", -1), ("seconds", float("nan")), ("requests", 0)])
def test_limits_are_checked(name, value):
    with pytest.raises(ValueError, match=f"Limits: argument `{name}`"):
        Limits(**{name: value})


def test_without_fastapi_the_extra_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("fastshap_vision.service")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "fastshap-kernels\[serve\]"'):
        importlib.import_module("fastshap_vision.service")


def test_a_run_is_served(tmp_path, monkeypatch, capsys):
    uvicorn, asked = pytest.importorskip("uvicorn"), []

    def answer(server, sockets):
        with TestClient(server.config.app) as client:
            asked.append(
                (sockets[0].getsockname(), client.get("/").json(), client.post("/explain?top=1", content=picture()))
            )

    monkeypatch.setattr(uvicorn.Server, "run", answer)
    sizes = ("patch_size=4", "embed_dim=8", "depth=1", "num_heads=2")
    train = ["train", "--coalitions", "2", "--epochs", "1", "--model-kwargs", *sizes, "--output", str(tmp_path)]
    assert main(train) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert main(["serve", "--checkpoint", str(tmp_path), "--port", str(port), "--max-pixels", "5000"]) == 0
    ((address, about, found),) = asked
    assert address == ("127.0.0.1", port)
    assert about["limits"]["pixels"] == 5000
    assert about["classes"] == list("0123456789")
    assert found.json()["predicted"]["class"] in about["classes"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--checkpoint", str(tmp_path), "--port", str(port)]) == 2
    assert f"can't listen on 127.0.0.1:{port}: it is in use. Choose another." in capsys.readouterr().err


def test_what_the_docs_say_runs():
    text = (Path(__file__).parents[2] / "docs" / "service.md").read_text()
    names = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, "service.md", "exec"), names)
    with TestClient(names["app"]) as client:
        found = client.post("/explain", content=picture()).json()
    (documented,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    assert list(json.loads(documented)) == list(found)
