"""What a service counts, in the text format of Prometheus."""

import time
from typing import TYPE_CHECKING

from isthmus.deploy.program import needed

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["Counted", "Metrics"]

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The figures of one service."""

    def __init__(self) -> None:
        client = needed("prometheus_client", "serve")
        self.registry = client.CollectorRegistry()
        here = {"namespace": "isthmus", "registry": self.registry}
        self.requests = client.Counter("requests", "Requests for predictions, by status.", ["status"], **here)
        self.seconds = client.Histogram(
            "request_seconds",
            "From request to answer, upload and all, where the status is 200.",
            buckets=SECONDS,
            **here,
        )
        self.batches = client.Histogram("batch_pictures", "Pictures predicted together.", buckets=range(1, 9), **here)
        self.queue = client.Gauge("queue_pictures", "Decoded pictures that wait for the engine.", **here)
        self.restarts = client.Counter("engine_restarts", "Engine processes that were lost.", **here)
        self.pictures = client.Counter("pictures", "Pictures predicted.", **here)

    def text(self) -> tuple[bytes, str]:
        """All of them, and the content type."""
        client = needed("prometheus_client", "serve")
        return client.generate_latest(self.registry), client.CONTENT_TYPE_LATEST


class Counted:
    """An application whose answers at `path` are counted."""

    def __init__(self, app: "ASGIApp", path: str, metrics: Metrics) -> None:
        self.app, self.path, self.metrics = app, path, metrics

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """One request."""
        if scope["type"] != "http" or scope["path"] != self.path:
            await self.app(scope, receive, send)
            return
        begun = time.perf_counter()

        async def counting(message: "Message") -> None:
            if message["type"] == "http.response.start":
                self.metrics.requests.labels(message["status"]).inc()
                if message["status"] == 200:
                    self.metrics.seconds.observe(time.perf_counter() - begun)
            await send(message)

        await self.app(scope, receive, counting)
