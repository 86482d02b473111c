"""What a service answers: predictions, its health, its figures, and a page for people."""

import asyncio
import base64
import hashlib
import os
import re
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch

from isthmus.arch.preprocess import Preprocess
from isthmus.data.decode import Pixels, decode, pixel_count
from isthmus.data.transform import centred
from isthmus.deploy.answers import Wanted
from isthmus.deploy.program import needed
from isthmus.deploy.serve.batcher import Batcher, LostError
from isthmus.deploy.serve.engine import Engine
from isthmus.deploy.serve.guard import AGAIN, Bounds, Guard
from isthmus.deploy.serve.metrics import Counted, Metrics
from isthmus.errors import DataError

if TYPE_CHECKING:
    from fastapi import FastAPI, Request

__all__ = ["Answer", "application"]

PREDICT = "/predict"
FIELD = "picture"
DECODERS = min(4, os.cpu_count() or 1)  # threads; each holds one picture with all its pixels
SCANS = 100  # of a JPEG; encoders write ten, and each takes time for all pixels however few bytes it has
JPEG, SCAN = b"\xff\xd8", b"\xff\xda"  # how these begin; a byte ff of pixels is followed by 00
BINARY = {"type": "string", "format": "binary"}
FORM = {"schema": {"type": "object", "required": [FIELD], "properties": {FIELD: BINARY}}}
KINDS = {kind: {"schema": BINARY} for kind in ("application/octet-stream", "image/jpeg", "image/png", "image/*")}
BODY = {"requestBody": {"required": True, "content": {**KINDS, "multipart/form-data": FORM}}}
REASONS = {
    408: "The picture came too slowly.",
    413: "Too many bytes or pixels.",
    415: "The body is no picture.",
    422: "The picture is damaged, or the request is not as described.",
    503: "Too many pictures at once, or the engine is starting; try again after `Retry-After` seconds.",
}


@dataclass(frozen=True, slots=True)
class Class:
    """A class and its probability in 0..1."""

    name: str
    probability: float


@dataclass(frozen=True, slots=True)
class Answer:
    """The best classes, the most probable first."""

    classes: list[Class]


@dataclass(frozen=True, slots=True)
class Failure:
    """Why there is no answer."""

    error: str


@dataclass(frozen=True, slots=True)
class Health:
    """Whether the engine runs."""

    ready: bool


class PictureError(Exception):
    """A picture that cannot be predicted, and the status that says so."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def image_of(content: bytes, record: Preprocess, max_pixels: int, *, exact: bool) -> Pixels:
    """What the network sees of an encoded picture; raises PictureError before a bomb is unpacked."""
    count = pixel_count(content)
    if count is not None and count > max_pixels:
        raise PictureError(413, f"the upload has more than {max_pixels:,} pixels; send a smaller one")
    if content.startswith(JPEG) and content.count(SCAN) > SCANS:
        raise PictureError(422, f"the upload is a JPEG of more than {SCANS} scans; save it anew")
    try:
        return centred(decode(content, record.channels, "the upload"), record, exact=exact)
    except DataError as error:
        raise PictureError(415 if count is None else 422, str(error)) from error


async def content_of(request: "Request") -> bytes:
    """The picture of a request: its body, or a field of a form. Raises PictureError where there is none."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        return await request.body()
    async with request.form(max_files=1, max_fields=8) as form:
        field = form.get(FIELD)
        if field is None or isinstance(field, str):
            raise PictureError(422, f"the form has no file in its field {FIELD!r}")
        return await field.read()


def application(
    engine: Engine, record: Preprocess, wanted: Wanted, bounds: Bounds, say: Callable[[str], object], *, exact: bool
) -> "FastAPI":
    """The service of an engine that runs; `say` hears when it is lost. Pictures are resized as `centred` says.

    Raises MissingExtraError.
    """
    needed("fastapi", "serve")
    needed("python_multipart", "serve")
    from fastapi import FastAPI, Query, Request, Response
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import HTMLResponse, JSONResponse
    from starlette.exceptions import HTTPException

    metrics = Metrics()
    batcher = Batcher(engine, bounds.engine_seconds, metrics, say)
    decoders = ThreadPoolExecutor(DECODERS, "decode", torch.set_num_threads, (1,))
    prepared = partial(image_of, record=record, max_pixels=bounds.max_pixels, exact=exact)
    page, policy = page_and_policy(bounds)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(batcher.run())
        yield
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        decoders.shutdown()

    app = FastAPI(
        title="isthmus",
        version=version("isthmus"),
        description=f"Pictures to {len(wanted.classes)} classes.",
        lifespan=lifespan,
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
    )

    def failure(status: int, text: str, headers: Any = None) -> JSONResponse:
        return JSONResponse({"error": text}, status, headers)

    @app.post(PREDICT, openapi_extra=BODY, responses=failures(*REASONS))
    async def predict(request: Request, top: Annotated[int, Query(ge=1)] = wanted.top) -> Answer:
        """Tell the classes of a picture: the body itself, or the field `picture` of a form."""
        content = await content_of(request)
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(bounds.answer_seconds):
            image = await loop.run_in_executor(decoders, prepared, content)
            logits = await batcher.logits(image)
        metrics.pictures.inc()
        (best,) = Wanted(classes=wanted.classes, top=top).best(torch.from_numpy(logits)[None])
        return Answer([Class(name, probability) for name, probability in best.items()])

    @app.get("/health", response_model=Health, responses={503: {"model": Health}})
    async def health() -> JSONResponse:
        """Tell whether pictures are predicted now: 200 where they are, 503 while the engine starts."""
        return JSONResponse({"ready": engine.alive}, 200 if engine.alive else 503)

    @app.get("/metrics", response_class=Response)
    async def figures() -> Response:
        """Give the figures of the service to Prometheus."""
        text, kind = metrics.text()
        return Response(text, headers={"Content-Type": kind})

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers=policy)

    @app.exception_handler(PictureError)
    async def bad_picture(_request: Request, error: PictureError) -> JSONResponse:
        return failure(error.status, str(error))

    @app.exception_handler(LostError)
    async def lost(_request: Request, _error: LostError) -> JSONResponse:
        return failure(503, "the engine was lost, and another one starts; try again in a moment", AGAIN)

    @app.exception_handler(TimeoutError)
    async def late(_request: Request, _error: TimeoutError) -> JSONResponse:
        return failure(503, f"no answer within {bounds.answer_seconds:g} seconds; try again in a moment", AGAIN)

    @app.exception_handler(RequestValidationError)
    async def unfit(_request: Request, error: RequestValidationError) -> JSONResponse:
        told = (f"{'.'.join(map(str, each['loc'][1:]))}: {each['msg']}" for each in error.errors())
        return failure(422, "; ".join(told))

    @app.exception_handler(HTTPException)
    async def refused(_request: Request, error: HTTPException) -> JSONResponse:
        return failure(error.status_code, error.detail, error.headers)

    @app.exception_handler(Exception)
    async def unforeseen(_request: Request, _error: Exception) -> JSONResponse:
        return failure(500, "an error of the service, told in its log")

    app.add_middleware(Guard, PREDICT, bounds)
    app.add_middleware(Counted, PREDICT, metrics)
    return app


def failures(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What the description of the service says of errors."""
    return {status: {"model": Failure, "description": REASONS[status]} for status in statuses}


def page_and_policy(bounds: Bounds) -> tuple[str, dict[str, str]]:
    """The page, and headers by which a browser runs its own script alone and asks nobody else."""
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    page = page.replace("MAX_BYTES", str(bounds.max_bytes))
    hashes = {}
    for tag in ("style", "script"):
        (inside,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        hashes[tag] = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
    policy = (
        "default-src 'none'; connect-src 'self'; img-src blob: data:; base-uri 'none'; form-action 'none'; "
        f"frame-ancestors 'none'; style-src 'sha256-{hashes['style']}'; script-src 'sha256-{hashes['script']}'"
    )
    return page, {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
