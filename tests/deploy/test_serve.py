"""The service beside `predict` on the same files: what it answers, what it refuses, and what it survives."""

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from itertools import repeat
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from PIL import Image

import isthmus
from broken_pictures import broken, encoded, png
from isthmus.arch.preprocess import IMAGENET
from isthmus.data.decode import decode, pixel_count
from isthmus.data.loader import Batch
from isthmus.data.transform import centred
from isthmus.deploy.predictor import Predictor
from isthmus.deploy.serve.app import SCAN, SCANS, PictureError, image_of
from isthmus.deploy.serve.guard import Bounds
from isthmus.deploy.serve.server import bound
from isthmus.deploy.serve.server import run as run_server
from isthmus.errors import IsthmusError, RecipeError, RunError
from isthmus.ship import serve
from services import Service, alive, peak, service, until
from small_runs import class_folders, network, weights

CLASSES = ("brick", "cell", "dome", "flower", "grass", "temple", "tower")
MB = 1_000_000


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> list[Path]:
    folder = class_folders(tmp_path_factory.mktemp("served") / "pictures", {"flower": 6, "temple": 6})
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    net = network()
    net.classes, net.preprocess = CLASSES, replace(net.preprocess, views=("identity", "hflip"))
    return weights(tmp_path_factory.mktemp("served_run") / "net.safetensors", net)


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def wanted(run, pictures) -> dict[Path, dict[str, float]]:
    """What `predict` says."""
    rows = isthmus.predict(run, *pictures, precision="fp32")
    return {row.path: dict(zip(row.classes, row.probabilities, strict=True)) for row in rows}


@pytest.fixture(scope="module")
def server(run, cache) -> Iterator[Service]:
    with service(run, cache, upload_seconds=1.0) as made:
        yield made


def told(document: dict[str, Any]) -> dict[str, float]:
    return {each["name"]: each["probability"] for each in document["classes"]}


def form(content: bytes, field: str = "picture") -> tuple[bytes, str]:
    """A form with a file, and its content type."""
    head = f'--edge\r\nContent-Disposition: form-data; name="{field}"; filename="a.jpg"\r\n\r\n'
    return head.encode() + content + b"\r\n--edge--\r\n", "multipart/form-data; boundary=edge"


def right(answer: tuple[int, dict[str, Any]], expected: dict[str, float]) -> bool:
    status, document = answer
    return status == 200 and told(document) == pytest.approx(expected, abs=1e-5)


# --- what it answers


def test_logits_of_any_number_are_those_of_run(run, pictures):
    """Also by an engine that is asked for whole batches."""
    made = Predictor(run, engine="torch", precision="fp32", batch_size=4)
    seen = [centred(decode(path), made.record) for path in pictures[:3]]
    images = torch.from_numpy(np.stack(seen)).permute(0, 3, 1, 2)
    batch = Batch(step=0, images=images, labels=torch.zeros(3), indices=torch.arange(3), part=0, parts=1)
    ((_, expected),) = made.run([batch])
    torch.testing.assert_close(made.logits(images), expected)
    torch.testing.assert_close(made.logits(images[:1]), expected[:1])
    asked = []
    run_, made.kind = made.opened.run, ("inductor", "fp32", "cpu")
    made.opened.run = lambda batch: asked.append(len(batch)) or run_(batch)
    torch.testing.assert_close(made.logits(images), expected)
    made.logits(images[:1])
    assert asked == [4, 4, 1, 1]


def test_pixels_are_counted_by_the_header(pictures, tmp_path):
    assert pixel_count(pictures[0].read_bytes()) == 1600
    assert pixel_count(png(8000, 7000)) == 56_000_000
    assert pixel_count(png(60_000, 60_000)) > 2 * Image.MAX_IMAGE_PIXELS
    assert pixel_count(b"this is no picture") is None


@pytest.mark.parametrize("exact", [True, False])
def test_pictures_are_resized_as_predict_does(pictures, exact):
    for picture in pictures[:3]:
        found = image_of(picture.read_bytes(), IMAGENET, 10**8, exact=exact)
        assert np.array_equal(found, centred(decode(picture), IMAGENET, exact=exact))


def test_a_jpeg_of_many_scans_is_refused():
    """Each costs time for all pixels, and a few bytes."""
    file = BytesIO()
    Image.new("L", (64, 64)).save(file, "jpeg", progressive=True)
    content = file.getvalue()
    scans, last = content.count(SCAN), content[content.rindex(SCAN) : -2]
    most, more = (content[:-2] + last * count + content[-2:] for count in (SCANS - scans, SCANS - scans + 1))
    assert image_of(most, IMAGENET, 10**8, exact=True).shape == (224, 224, 3)
    with pytest.raises(PictureError, match="a JPEG of more than 100 scans"):
        image_of(more, IMAGENET, 10**8, exact=True)


def test_predictions_are_those_of_predict(server, pictures, wanted):
    assert {path.suffix for path in pictures} == {".jpg", ".png"}
    for path in pictures:
        assert right(server.predict(path.read_bytes()), wanted[path])
    body, kind = form(pictures[0].read_bytes())
    assert right(server.predict(body, Content_Type=kind), wanted[pictures[0]])
    _, document = server.predict(pictures[0].read_bytes())
    assert list(told(document)) == list(wanted[pictures[0]])  # the best first
    large = BytesIO()
    Image.fromarray(decode(pictures[0])).resize((3000, 2000)).save(large, "png", compress_level=0)
    assert server.predict(form(large.getvalue()[:-20])[0], Content_Type=kind)[0] == 413  # 18 MB


def test_as_many_classes_as_are_asked_for(server, pictures):
    content = pictures[0].read_bytes()
    for asked, given in ((1, 1), (3, 3), (7, 7), (1000, 7)):
        _, document = server.predict(content, f"/predict?top={asked}")
        assert len(document["classes"]) == given
    assert sum(told(document).values()) == pytest.approx(1, abs=1e-5)


def test_many_at_once(server, pictures, wanted):
    before = server.figures()
    with ThreadPoolExecutor(16) as pool:
        every = list(pool.map(lambda path: (path, server.predict(path.read_bytes())), pictures * 8))
    assert all(right(answer, wanted[path]) for path, answer in every)
    after = server.figures()
    gained = {name: after[name] - before.get(name, 0) for name in after}
    assert gained["isthmus_pictures_total"] == gained["isthmus_batch_pictures_sum"] == 96
    assert gained["isthmus_requests_total 200"] == gained["isthmus_request_seconds_count"] == 96
    assert gained["isthmus_batch_pictures_count"] <= 96
    assert after["isthmus_queue_pictures"] == after["isthmus_engine_restarts_total"] == 0


# --- what it refuses


def test_every_kind_of_broken_picture(server, pictures, wanted, tmp_path):
    """Each has a reason that names no file of the server, and the next sound one is predicted."""
    found = {}
    for kind, path in broken(tmp_path / "broken").items():
        if path.exists():
            status, document = server.predict(path.read_bytes())
            assert list(document) == ["error"], kind
            assert document["error"], kind
            assert "/" not in document["error"], kind
            found[kind] = status
    assert right(server.predict(pictures[0].read_bytes()), wanted[pictures[0]])
    assert len(found) == 19
    assert set(found.values()) <= {413, 415, 422}
    assert (found["text"], found["png cut in the middle"], found["decompression bomb"]) == (415, 422, 413)


def test_too_many_pixels_are_not_unpacked(server):
    """Sound pictures of few bytes: white, 56 and 400 million pixels."""
    before = peak(server.process.pid)
    for width, height in ((8000, 7000), (20_000, 20_000)):
        file = BytesIO()
        Image.new("1", (width, height), 1).save(file, "png")
        assert len(file.getvalue()) < MB
        status, document = server.predict(file.getvalue())
        assert (status, document["error"]) == (413, "the upload has more than 50,000,000 pixels; send a smaller one")
    assert peak(server.process.pid) - before < 50 * MB


@pytest.mark.parametrize("head", ["Content-Length: 100000000", "Transfer-Encoding: chunked"])
def test_a_large_body_is_not_read_to_its_end(server, head):
    chunk = b"x" * MB
    chunks = [chunk if "Length" in head else b"%x\r\n%b\r\n" % (MB, chunk)] * 100
    before = peak(server.process.pid)

    async def sixteen() -> list[tuple[int, dict[str, Any], int]]:
        return await asyncio.gather(*(server.send(iter(chunks), head) for _ in range(16)))

    for status, document, sent in asyncio.run(sixteen()):
        assert (status, document["error"]) == (413, "the upload has more than 10,000,000 bytes; send a smaller one")
        assert sent < 60 * MB
    assert peak(server.process.pid) - before < 16 * 3 * 10 * MB


def test_slow_clients_are_ended_while_others_are_served(server, pictures, wanted):
    async def slow() -> list[tuple[int, dict[str, Any], int]]:
        asked = asyncio.to_thread(lambda: [server.predict(path.read_bytes()) for path in pictures])
        crawling = (server.send(repeat(b"x"), "Content-Length: 5000", pause=0.05) for _ in range(20))
        answers, *ended = await asyncio.gather(asked, *crawling)
        assert all(right(answer, wanted[path]) for path, answer in zip(pictures, answers, strict=True))
        return ended

    for status, document, _ in asyncio.run(slow()):
        assert status == 408
        assert "too slowly" in document["error"]


def test_a_client_that_leaves_takes_no_place(server, pictures, wanted):
    for _ in range(70):  # more than the queue is long
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(b"POST /predict HTTP/1.1\r\nHost: here\r\nContent-Length: 5000\r\n\r\nabc")
    assert right(server.predict(pictures[0].read_bytes()), wanted[pictures[0]])


def test_every_error_is_json(server, pictures):
    body, kind = form(pictures[0].read_bytes(), field="other")
    cases = {
        (404, "Not Found"): server.predict(b"", "/nothing"),
        (405, "Method Not Allowed"): json_of(server.ask("GET", "/predict")),
        (422, "top: Input should be greater than or equal to 1"): server.predict(b"x", "/predict?top=0"),
        (422, "the form has no file in its field 'picture'"): server.predict(body, Content_Type=kind),
        (415, "the upload is empty; copy it again or leave it out"): server.predict(b""),
    }
    for (status, error), answer in cases.items():
        assert answer == (status, {"error": error})
    status, document = server.predict(b"no edge", Content_Type="multipart/form-data")
    assert (status, list(document)) == (400, ["error"])


def json_of(answer: tuple[int, dict[str, str], bytes]) -> tuple[int, dict[str, Any]]:
    status, _, text = answer
    return status, json.loads(text)


def test_the_description_says_what_it_answers(server, pictures):
    _, description = json_of(server.ask("GET", "/openapi.json"))
    post = description["paths"]["/predict"]["post"]
    assert {"image/jpeg", "application/octet-stream", "multipart/form-data"} <= set(post["requestBody"]["content"])
    assert set(post["responses"]) == {"200", "408", "413", "415", "422", "503"}

    def check(status: int, document: dict[str, Any]) -> None:
        schema = post["responses"][str(status)]["content"]["application/json"]["schema"]
        jsonschema.validate(document, {**schema, "components": description["components"]})

    check(*server.predict(pictures[0].read_bytes()))
    check(*server.predict(b"no picture"))
    assert server.ask("GET", "/docs")[0] == server.ask("GET", "/redoc")[0] == 404  # they would load foreign scripts


def test_metrics_are_those_of_prometheus(server):
    status, headers, text = server.ask("GET", "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=")
    assert b"# TYPE isthmus_request_seconds histogram" in text
    assert "isthmus_batch_pictures_bucket 8.0" in server.figures()


def test_the_page_asks_nobody_else(server):
    status, headers, text = server.ask("GET", "/")
    policy = headers["content-security-policy"]
    assert status == 200
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not any(address in text for address in (b"http:", b"https:", b'src="', b"@import"))


# --- what it survives


@pytest.fixture(scope="module")
def narrow(run, cache) -> Iterator[Service]:
    """A server that has little room."""
    with service(run, cache, queue=24, uploads=24, uploads_of_max=3, upload_seconds=2.0) as made:
        yield made


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32) as made:
        yield made


def asked_while_held(
    made: Service, pool: ThreadPoolExecutor, paths: list[Path]
) -> list[Future[tuple[int, dict[str, Any]]]]:
    """Requests that a stopped engine cannot answer: one batch is with it, the rest waits."""
    os.kill(made.engine(), signal.SIGSTOP)
    first = [pool.submit(made.predict, paths[0].read_bytes())]
    until(lambda: made.figures()["isthmus_queue_pictures"] == 1 or first[0].done() or in_work(made))
    rest = [pool.submit(made.predict, path.read_bytes()) for path in paths[1:]]
    until(lambda: made.figures()["isthmus_queue_pictures"] >= len(paths) - 8)
    return [*first, *rest]


def in_work(made: Service) -> bool:
    """Whether the engine has what came."""
    return made.figures()["isthmus_queue_pictures"] == 0


def test_a_full_queue_answers_at_once(narrow, pictures, wanted, pool):
    paths = pictures * 2
    waiting = asked_while_held(narrow, pool, paths)  # 24
    until(lambda: narrow.ask("POST", "/predict", b"x")[0] == 503)
    status, headers, text = narrow.ask("POST", "/predict", pictures[0].read_bytes())
    assert (status, headers["retry-after"]) == (503, "1")
    assert "24 other pictures are waiting" in json.loads(text)["error"]
    os.kill(narrow.engine(), signal.SIGCONT)
    assert all(right(each.result(), wanted[path]) for each, path in zip(waiting, paths, strict=True))
    slow = [socket.create_connection(("127.0.0.1", narrow.port)) for _ in range(24)]
    for each in slow:
        each.sendall(b"POST /predict HTTP/1.1\r\nHost: here\r\nContent-Length: 5000\r\n\r\nabc")
    status, document = until(lambda: refused(narrow, pictures[0].read_bytes()))
    assert (status, document["error"]) == (503, "24 other pictures are being sent; try again in a moment")
    for each in slow:
        each.close()
    assert right(until(lambda: served(narrow, pictures[0].read_bytes())), wanted[pictures[0]])


def refused(made: Service, content: bytes) -> Any:
    answer = made.predict(content)
    return answer if answer[0] == 503 else None


def served(made: Service, content: bytes) -> Any:
    answer = made.predict(content)
    return answer if answer[0] == 200 else None


def test_bodies_in_memory_are_bounded(narrow, pictures, wanted):
    """Ten clients send nine of ten million bytes and then wait, where three bodies may be held."""

    async def ten() -> list[tuple[int, dict[str, Any], int]]:
        chunks = [b"x" * MB] * 9
        return await asyncio.gather(*(narrow.send(iter(chunks), "Content-Length: 10000000") for _ in range(10)))

    found = Counter((status, document["error"][:22]) for status, document, _ in asyncio.run(ten()))
    assert found[503, "other pictures fill th"] >= 7
    assert found[408, "the upload came too sl"] == 10 - found[503, "other pictures fill th"]
    assert right(narrow.predict(pictures[0].read_bytes()), wanted[pictures[0]])
    assert peak(narrow.process.pid) < 1_500 * MB


def test_a_killed_engine_takes_its_batch_alone(narrow, pictures, wanted, pool):
    """Those that it had are told to come again, the others wait for the next engine; an idle one is replaced too."""
    paths, before = pictures * 2, narrow.figures()["isthmus_engine_restarts_total"]
    waiting = asked_while_held(narrow, pool, paths)
    killed = narrow.engine()
    os.kill(killed, signal.SIGKILL)
    until(lambda: narrow.ask("GET", "/health")[0] == 503)
    answers = [each.result() for each in waiting]
    lost = [status for status, _ in answers if status != 200]
    assert 1 <= len(lost) <= 8
    assert set(lost) == {503}
    assert all(right(each, wanted[path]) for path, each in zip(paths, answers, strict=True) if each[0] == 200)
    assert json_of(narrow.ask("GET", "/health")) == (200, {"ready": True})
    assert narrow.figures()["isthmus_engine_restarts_total"] - before == 1
    assert narrow.engine() != killed
    os.kill(narrow.engine(), signal.SIGKILL)
    until(lambda: narrow.ask("GET", "/health")[0] == 503)
    assert right(narrow.predict(pictures[0].read_bytes()), wanted[pictures[0]])


def test_an_engine_that_hangs_is_replaced_and_none_outlives_a_killed_service(run, cache, pictures, wanted):
    with service(run, cache, engine_seconds=0.5) as made:
        os.kill(hung := made.engine(), signal.SIGSTOP)
        status, headers, text = made.ask("POST", "/predict", pictures[0].read_bytes())
        assert (status, headers["retry-after"]) == (503, "1")
        assert "another one starts" in json.loads(text)["error"]
        assert right(made.predict(pictures[0].read_bytes()), wanted[pictures[0]])
        assert not alive(hung)
        engine = made.engine()
        made.process.kill()
        made.process.wait()
        until(lambda: not alive(engine), 10)


def test_an_ended_service_answers_what_it_has(run, cache, pictures, wanted, pool):
    with service(run, cache) as made:
        waiting = asked_while_held(made, pool, pictures)
        engine = made.engine()
        made.process.send_signal(signal.SIGTERM)

        def closed() -> bool:
            try:
                socket.create_connection(("127.0.0.1", made.port)).close()
            except OSError:
                return True
            return False

        until(closed)
        assert not any(each.done() for each in waiting)
        os.kill(engine, signal.SIGCONT)
        assert all(right(each.result(), wanted[path]) for each, path in zip(waiting, pictures, strict=True))
        assert made.process.wait(30) == 0
        assert made.process.stderr.read() == ""
        assert not alive(engine)


def test_what_cannot_be_served_is_told_before_an_engine_starts(run, cache, tmp_path):
    isthmus.save_weights(isthmus.create(replace(network().spec, num_classes=0)), headless := tmp_path / "a.safetensors")
    with pytest.raises(IsthmusError, match="nothing"):
        serve(tmp_path / "nothing")
    with pytest.raises(RecipeError, match="has no classifier"):
        serve(headless)
    with pytest.raises(RecipeError, match="queue is 0; it must be above 0"):
        Bounds(queue=0)
    with pytest.raises(RunError, match=r"int8 is calibrated on the pictures of a run, and .* names none"):
        serve(run, precision="int8")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "isthmus", "serve", str(run), "--port", port]
        found = subprocess.run(command, check=False, capture_output=True, text=True)
    message = f"isthmus: cannot listen on 127.0.0.1, port {port}: Address already in use; choose another --host or"
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith(message)
    assert len(found.stderr.splitlines()) == 1


def test_the_second_of_two_services_that_start_together_is_told():
    """Both have the port until the first one listens."""

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})

    with bound("127.0.0.1", 0) as first, bound("127.0.0.1", first.getsockname()[1]) as second:
        first.listen()
        with pytest.raises(RunError, match="Address already in use; choose another"):
            run_server(app, second, lambda: None)


# --- all of it at once


@pytest.mark.long
def test_a_thousand_requests_of_every_kind(run, cache, pictures, wanted):
    """32 connections, one request in ten broken; the engine is killed in the middle."""
    dice = random.Random(0)
    bad = {
        "cut": encoded("JPEG")[:2000],
        "bomb": png(60_000, 60_000),
        "text": b"this is no picture",
        "large": b"",
        "slow": b"",
    }
    kinds = [dice.choice(list(bad)) if dice.random() < 0.1 else "good" for _ in range(1000)]
    found: list[tuple[str, int]] = []

    with service(run, cache, upload_seconds=1.0) as made:
        before = peak(made.process.pid)

        async def one(number: int, kind: str) -> None:
            if kind == "slow":
                status, _, _ = await made.send(repeat(b"x"), "Content-Length: 5000", pause=0.05)
            elif kind == "large":
                status, _, _ = await made.send(iter([b"x" * MB] * 100), "Content-Length: 100000000")
            else:
                path = pictures[number % len(pictures)]
                status, document = await asyncio.to_thread(made.predict, bad.get(kind) or path.read_bytes())
                assert kind != "good" or status == 503 or right((status, document), wanted[path])
            found.append((kind, status))

        async def every() -> None:
            numbers = iter(list(enumerate(kinds)))

            async def connection() -> None:
                for number, kind in numbers:
                    if number == 500:
                        os.kill(made.engine(), signal.SIGKILL)
                    await one(number, kind)

            await asyncio.gather(*(connection() for _ in range(32)))

        asyncio.run(every())
        counts = Counter(found)
        assert len(found) == 1000
        assert {status for kind, status in found if kind == "good"} <= {200, 503}
        assert counts["good", 503] <= 8
        ends = {"cut": 422, "bomb": 413, "text": 415, "large": 413, "slow": 408}
        assert {kind: status for kind, status in found if kind != "good"} == ends
        assert peak(made.process.pid) - before < 400 * MB
