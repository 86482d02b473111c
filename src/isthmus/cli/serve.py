"""The command that answers over HTTP."""

from typing import Literal

__all__ = ["serve"]


def serve(
    run: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    top: int = 5,
    engine: Literal["auto", "torch", "inductor", "onnxruntime", "openvino"] = "auto",
    precision: Literal["auto", "fp32", "bf16", "int8"] = "auto",
    max_bytes: int = 10_000_000,
    max_pixels: int = 50_000_000,
    queue: int = 64,
) -> None:
    """Answer over HTTP what pictures show, with a page to drop them on.

    Parameters
    ----------
    run
        A run folder or a weight file with metadata.
    host
        The address to listen on; 0.0.0.0 for every network of this machine.
    port
        The port; 0 takes a free one.
    top
        Classes a picture, the most probable first; a request may ask for others.
    engine
        What computes; the fastest here unless given.
    precision
        The fastest that keeps the numbers unless given; int8 is calibrated and measured on pictures of the run.
    max_bytes
        Bytes that a picture may have.
    max_pixels
        Pixels that a picture may have.
    queue
        Pictures that may wait at once.
    """
    from isthmus.deploy.serve.guard import Bounds
    from isthmus.report.terminal import TerminalReporter
    from isthmus.ship import serve as until_stopped

    with TerminalReporter() as reporter:
        until_stopped(
            run,
            host=host,
            port=port,
            top=top,
            engine=engine,
            precision=precision,
            bounds=Bounds(max_bytes=max_bytes, max_pixels=max_pixels, queue=queue),
            reporter=reporter,
        )
