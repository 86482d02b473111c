"""Claim: the service answers sound pictures as `predict` does and broken ones with their reason, in bounded memory.

ResNet-50, 1,000 requests over 32 connections; one in ten is broken: a JPEG that is cut, a decompression bomb, a text,
100 MB, a client that sends a byte now and then. Then the sound ones alone, for pictures a second and percentiles.
"""

import asyncio
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import torch

import isthmus
from isthmus.deploy.pace import rates
from isthmus.deploy.predictor import Predictor
from measure import write_result
from photographs import write_photographs

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from broken_pictures import encoded, png

REQUESTS, CONNECTIONS, PICTURES = 1000, 32, 200
MB = 1_000_000
CLOSE = 1e-3  # in probability: batches of other sizes are summed in another order
BAD = {"cut": 422, "bomb": 413, "text": 415, "100 MB": 413, "slow": 408}
BODIES = {"cut": encoded("JPEG")[:2000], "bomb": png(60_000, 60_000), "text": b"this is no picture"}
Row = tuple[str, int, float, bool]


async def one(session: aiohttp.ClientSession, url: str, kind: str, picture: bytes, wanted: dict[str, float]) -> Row:
    """Kind, status, seconds, and whether the answer is right."""

    async def crawling() -> Any:
        for _ in range(10_000):
            yield b"x"
            await asyncio.sleep(0.5)

    slow = kind == "slow"
    body = crawling() if slow else bytes(100 * MB) if kind == "100 MB" else BODIES.get(kind) or picture
    begun = time.perf_counter()
    async with session.post(url, data=body) as answer:
        document = await answer.json()
    seconds = time.perf_counter() - begun
    if kind != "sound":
        return kind, answer.status, seconds, answer.status == BAD[kind] and bool(document["error"])
    found = {each["name"]: each["probability"] for each in document.get("classes", ())}
    right = bool(found) and all(abs(value - wanted[name]) < CLOSE for name, value in found.items())
    return kind, answer.status, seconds, right


async def load(address: str, kinds: Sequence[str], pictures: Sequence[Path], wanted: Any) -> tuple[list[Row], float]:
    """The rows of all requests, and how long they took."""
    numbers, rows = iter(list(enumerate(kinds))), list[Row]()
    contents = {picture: picture.read_bytes() for picture in pictures}
    begun = time.perf_counter()
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=120)
    ) as session:

        async def connection() -> None:
            for number, kind in numbers:
                picture = pictures[number % len(pictures)]
                rows.append(await one(session, f"{address}/predict?top=1000", kind, contents[picture], wanted[picture]))

        await asyncio.gather(*(connection() for _ in range(CONNECTIONS)))
    return rows, time.perf_counter() - begun


def peaks(process: int) -> dict[str, float]:
    """The most MB that the server and the process of its engine had."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            line = (folder / "cmdline").read_text()
            most = int(re.search(r"VmHWM:\s+(\d+)", (folder / "status").read_text()).group(1)) / 1024
        except (OSError, AttributeError):
            continue
        if int(folder.name) == process:
            found["server"] = most
        elif parent == process and "spawn_main" in line:
            found["engine"] = most
    return found


def percentiles(rows: Sequence[Row]) -> dict[str, float]:
    """Milliseconds."""
    seconds = [each[2] for each in rows]
    return {f"p{part}": float(np.percentile(seconds, part)) * 1e3 for part in (50, 90, 99)} | {
        "max": max(seconds) * 1e3
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["ISTHMUS_CACHE"] = str(folder / "cache")  # engines are chosen here and now
        write_photographs(folder / "pictures", PICTURES)
        pictures = sorted((folder / "pictures").rglob("*.jpg"))
        net = isthmus.create("resnet50").eval()
        net.classes = tuple(f"class {place}" for place in range(net.spec.num_classes))
        isthmus.save_weights(net, run := folder / "net.safetensors")
        wanted = {
            row.path: dict(zip(row.classes, row.probabilities, strict=True))
            for row in isthmus.predict(run, *pictures, top=1000, precision="fp32")
        }
        command = [sys.executable, "-m", "isthmus", "serve", str(run), "--port", "0", "--precision", "fp32"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
            said = []
            for line in server.stderr:
                said.append(line.strip())
                if "serving at" in line:
                    break
            drain = threading.Thread(target=server.stderr.read, daemon=True)
            drain.start()
            address = said[-1].split()[-1]
            before = peaks(server.pid)
            dice = random.Random(0)
            kinds = [dice.choice(list(BAD)) if dice.random() < 0.1 else "sound" for _ in range(REQUESTS)]
            rows, _ = asyncio.run(load(address, kinds, pictures, wanted))
            after = peaks(server.pid)
            alone, seconds = asyncio.run(load(address, ["sound"] * (REQUESTS // 4), pictures, wanted))
            os.kill(server.pid, signal.SIGTERM)
            status = server.wait(60)
            drain.join()
        engine = Predictor(net, engine="auto", precision="fp32", hint="latency", batch_size=8)
        images = torch.randn(engine.batch_size, 3, 224, 224)
        rate = rates({"": lambda: engine(images)}, engine.batch_size)[""]
    sound = [row for row in rows if row[0] == "sound"]
    table = [
        {"request": kind, "status": number, "count": count, "right": sum(r[3] for r in rows if r[:2] == (kind, number))}
        for (kind, number), count in sorted(Counter(row[:2] for row in rows).items())
    ]
    write_result(
        "serve",
        __doc__,
        {
            "sound pictures answered as predict does": f"{sum(row[3] for row in sound)} of {len(sound)}",
            "broken ones answered with their reason": f"{sum(r[3] for r in rows) - sum(r[3] for r in sound)}"
            f" of {len(rows) - len(sound)}",
            "milliseconds of sound ones among broken ones": percentiles(sound),
            "milliseconds of sound ones alone": percentiles(alone),
            "median milliseconds of broken ones, but slow ones": statistics.median(
                row[2] * 1e3 for row in rows if row[0] not in ("sound", "slow")
            ),
            "pictures/s of sound ones alone": len(alone) / seconds,
            "the same of the engine, with batches of 8 in memory": rate,
            "MB of memory at the start, at most": before,
            "MB of memory after all requests, at most": after,
            "exit status after SIGTERM": status,
        },
        table,
        note=said[1],
    )


if __name__ == "__main__":
    main()
