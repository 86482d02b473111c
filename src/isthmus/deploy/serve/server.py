"""The server: it begins when the engine is ready, and ends when every request has its answer."""

import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from isthmus.arch.preprocess import Preprocess
from isthmus.data.transform import shows_grey_levels
from isthmus.deploy.answers import Wanted
from isthmus.deploy.program import needed
from isthmus.deploy.serve.app import application
from isthmus.deploy.serve.engine import Engine
from isthmus.deploy.serve.guard import Bounds
from isthmus.errors import EngineError, RunError
from isthmus.messages import first_line, listed

__all__ = ["serve"]

CONNECTIONS = 512  # at once, whatever they do
FINISH = 20  # seconds that requests have to end in after a signal


def serve(
    engine: Engine,
    record: Preprocess,
    wanted: Wanted,
    *,
    host: str,
    port: int,
    bounds: Bounds,
    say: Callable[[str], object],
) -> None:
    """Answer requests until a signal comes, with an engine that does not run yet.

    Raises RunError where the port is taken, EngineError with what is wrong with the engine, MissingExtraError.
    """
    for library in ("fastapi", "uvicorn", "prometheus_client"):
        needed(library, "serve")
    with bound(host, port) as door:
        before = signal.signal(signal.SIGTERM, leave)
        try:
            say("preparing the engine; which one is the fastest is found out once for a network")
            try:
                choice = engine.start()
            except EOFError as error:
                raise EngineError("the engine's process ended while it started; what it said is above") from error
            say(str(choice))
            exact = shows_grey_levels(choice.rows[0].precision)
            app = application(engine, record, wanted, bounds, say, exact=exact)
            name = f"[{host}]" if ":" in host else host
            address = f"http://{name}:{door.getsockname()[1]}"
            limits = f"{bounds.max_bytes:,} bytes and {bounds.max_pixels:,} pixels a picture, {bounds.queue} at once"
            say(f"{len(wanted.classes)} classes: {listed(wanted.classes)}; at most {limits}")
            run(app, door, lambda: say(f"serving at {address}"))
        finally:
            engine.end()
            signal.signal(signal.SIGTERM, before)


def leave(_signal: int, _frame: FrameType | None) -> None:
    """End in order: SIGTERM is no failure."""
    sys.exit(0)


def bound(host: str, port: int) -> socket.socket:
    """A socket at an address that takes no connections yet; raises RunError."""
    door = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        door.bind((host, port))
    except (OSError, OverflowError) as error:
        door.close()
        raise cannot_listen(host, port, error) from error
    return door


def cannot_listen(host: str, port: int, error: Exception) -> RunError:
    """What to say of an address that cannot be had."""
    reason = getattr(error, "strerror", None) or first_line(error)
    return RunError(f"cannot listen on {host}, port {port}: {reason}; choose another --host or --port")


def run(app: Any, door: socket.socket, opened: Callable[[], object]) -> None:
    """Serve an application; `opened` is called when the first request may come. Raises RunError."""
    import uvicorn

    config = uvicorn.Config(
        app,
        http="h11",
        loop="asyncio",
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=FINISH,
    )

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            opened()

    host, port, *_ = door.getsockname()
    try:
        Server(config).run([door])
    except OSError as error:  # another service that started at the same time was sooner ready
        raise cannot_listen(host, port, error) from error
