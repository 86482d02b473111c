"""What a service lets in: bodies of a size, at a pace and in a number that its memory holds."""

import asyncio
import json
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from isthmus.errors import RecipeError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["AGAIN", "Bounds", "Guard"]

AGAIN = {"Retry-After": "1"}  # seconds
SLOWEST = 20_000  # bytes a second of a whole upload, after the first `upload_seconds`
LINGER = 2.0  # seconds in which a client may read its answer before the connection is closed
UNREAD = 4  # times the bytes of the largest picture: what a client may send meanwhile


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """How much a service takes: bytes and pixels of a picture, pictures at once, and seconds for each step.

    `queue` are the pictures that came and have no answer yet; `uploads` are coming, and may hold `held_bytes` together
    with those of the queue. An upload that pauses for `upload_seconds` is too slow, and an engine that takes longer
    than `engine_seconds` for a batch hangs. Raises RecipeError for what lets nothing in.
    """

    max_bytes: int = 10_000_000
    max_pixels: int = 50_000_000
    queue: int = 64
    uploads: int = 256
    uploads_of_max: int = 32
    upload_seconds: float = 10.0
    engine_seconds: float = 30.0
    answer_seconds: float = 60.0

    def __post_init__(self) -> None:
        for each in fields(self):
            if not (value := getattr(self, each.name)) > 0:
                raise RecipeError(f"{each.name} is {value}; it must be above 0")

    @property
    def held_bytes(self) -> int:
        """Of all bodies in memory."""
        return self.uploads_of_max * self.max_bytes


class RefusedError(Exception):
    """A request that is answered before its body is read to the end."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Guard:
    """An application that gets the bodies sent to `path` in one piece, or not at all.

    So no slow client takes the place of one whose picture is here.
    """

    def __init__(self, app: "ASGIApp", path: str, bounds: Bounds) -> None:
        self.app, self.path, self.bounds = app, path, bounds
        self.uploads = self.waiting = self.held = 0

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """One request."""
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] != self.path:
            await self.app(scope, receive, send)
            return
        chunks: list[bytes] = []
        try:
            self.check(scope)
            self.uploads += 1
            try:
                whole = await self.read(receive, chunks)
            finally:
                self.uploads -= 1
            if not whole:
                return
            self.check_queue()
            chunks[:] = [b"".join(chunks)]
            self.waiting += 1
            try:
                await self.app(scope, in_one_piece(chunks[0], receive), send)
            finally:
                self.waiting -= 1
        except RefusedError as error:
            self.free(chunks)
            await refuse(error, UNREAD * self.bounds.max_bytes, receive, send)
        finally:
            self.free(chunks)

    def free(self, chunks: list[bytes]) -> None:
        """Forget a body."""
        self.held -= sum(map(len, chunks))
        chunks.clear()

    def check(self, scope: "Scope") -> None:
        """Raise RefusedError for what the head of a request tells."""
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if int(length) > self.bounds.max_bytes:  # a server lets digits alone through
            raise self.too_large()
        self.check_queue()
        if self.uploads >= self.bounds.uploads:
            raise RefusedError(503, f"{self.uploads} other pictures are being sent; try again in a moment")

    def check_queue(self) -> None:
        """Raise RefusedError where the queue is full."""
        if self.waiting >= self.bounds.queue:
            raise RefusedError(503, f"{self.waiting} other pictures are waiting; try again in a moment")

    async def read(self, receive: "Receive", chunks: list[bytes]) -> bool:
        """Read a body; False where the client left. Raises RefusedError for too large, too slow, too many."""
        now, size, more = asyncio.get_running_loop().time, 0, True
        begun, pause = now(), self.bounds.upload_seconds
        try:
            async with asyncio.timeout(pause) as limit:
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return False
                    chunk, more = message.get("body", b""), message.get("more_body", False)
                    size += len(chunk)
                    if size > self.bounds.max_bytes:
                        raise self.too_large()
                    if self.held + len(chunk) > self.bounds.held_bytes:
                        raise RefusedError(503, "other pictures fill the memory; try again in a moment")
                    chunks.append(chunk)
                    self.held += len(chunk)
                    limit.reschedule(pause + min(now(), begun + size / SLOWEST))
        except TimeoutError as error:
            raise RefusedError(408, f"the upload came too slowly: {size:,} bytes until now") from error
        return True

    def too_large(self) -> RefusedError:
        """A body over the limit."""
        return RefusedError(413, f"the upload has more than {self.bounds.max_bytes:,} bytes; send a smaller one")


def in_one_piece(body: bytes, receive: "Receive") -> "Receive":
    """The channel of a request whose body was read."""
    unread = [body]

    async def again() -> "Message":
        return {"type": "http.request", "body": unread.pop(), "more_body": False} if unread else await receive()

    return again


async def refuse(error: RefusedError, more: int, receive: "Receive", send: "Send") -> None:
    """Answer, and throw away `more` bytes that come: a client that still sends might not see its answer else."""
    text = json.dumps({"error": str(error)}).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(text)), "Connection": "close"}
    headers |= AGAIN if error.status == 503 else {}
    pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": text, "more_body": True})
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER):
            while more > 0 and (message := await receive()).get("more_body", False):
                more -= len(message["body"])
    await send({"type": "http.response.body", "body": b""})
