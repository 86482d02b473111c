"""`isthmus serve` as a real process on this machine, and ways to ask it."""

import asyncio
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from processes import environment

SCRIPT = """
import json, sys
from isthmus.deploy.serve.guard import Bounds
from isthmus.ship import serve
from isthmus.train.reporter import Reporter

class Said(Reporter):
    def say(self, line):
        print(line, flush=True)

if __name__ == "__main__":
    bounds = Bounds(**json.loads(sys.argv[2]))
    serve(sys.argv[1], port=0, engine="torch", precision="fp32", bounds=bounds, reporter=Said())
"""


def until(true: Callable[[], Any], seconds: float = 60) -> Any:
    """What a condition gives when it is true, which it must be soon."""
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)
    return found


def alive(pid: int) -> bool:
    """Whether a process runs."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def peak(pid: int) -> int:
    """The most memory that a process had, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


class Service:
    """A server that runs."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.said = process, list[str]()
        for line in process.stdout:
            self.said.append(line.strip())
            if "serving at" in line:
                break
        else:
            raise AssertionError(self.said, process.stderr.read())
        self.address = self.said[-1].split()[-1]
        self.port = int(self.address.rpartition(":")[2])

    def engine(self) -> int:
        """The process of the engine that runs now."""

        def found() -> int:
            for folder in Path("/proc").glob("[0-9]*"):
                with suppress(OSError):
                    parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                    if parent == self.process.pid and "spawn_main" in (folder / "cmdline").read_text():
                        return int(folder.name)
            return 0

        return until(found)

    def ask(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def predict(self, content: bytes, path: str = "/predict", **headers: str) -> tuple[int, dict[str, Any]]:
        """Status and document of a prediction."""
        status, _, text = self.ask("POST", path, content, **headers)
        return status, json.loads(text)

    def figures(self) -> dict[str, float]:
        """The metrics by name, those with labels by name and values."""
        _, _, text = self.ask("GET", "/metrics")
        every = [sample for family in text_string_to_metric_families(text.decode()) for sample in family.samples]
        return {" ".join([sample.name, *sample.labels.values()]): sample.value for sample in every}

    async def send(
        self, chunks: Iterator[bytes], head: str, *, pause: float = 0.0, path: str = "/predict"
    ) -> tuple[int, dict[str, Any], int]:
        """Status, document and bytes sent of a request that stops sending when it is answered."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(f"POST {path} HTTP/1.1\r\nHost: here\r\n{head}\r\n\r\n".encode())
        answer, sent = asyncio.create_task(answered(reader)), 0
        with suppress(ConnectionError):
            for chunk in chunks:
                if answer.done():
                    break
                writer.write(chunk)
                await writer.drain()
                sent += len(chunk)
                await asyncio.sleep(pause)
        try:
            status, document = await asyncio.wait_for(answer, 60)
        finally:
            writer.transport.abort()
        return status, document, sent


async def answered(reader: asyncio.StreamReader) -> tuple[int, dict[str, Any]]:
    """Status and document of an answer, as soon as it is there."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    body = await reader.readexactly(int(head.partition("content-length:")[2].split()[0]))
    return int(head.split()[1]), json.loads(body)


@contextmanager
def service(run: Path, cache: Path, **bounds: float) -> Iterator[Service]:
    """A server that runs until the block ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(run), json.dumps(bounds)],
        env=environment(ISTHMUS_CACHE=str(cache), OMP_NUM_THREADS="1") | {"PYTHONWARNINGS": "default"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    engine = 0
    try:
        made = Service(process)
        engine = made.engine()
        yield made
    finally:
        for pid in (engine, process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        process.terminate()
        try:
            process.communicate(timeout=60)
        finally:
            process.kill()
