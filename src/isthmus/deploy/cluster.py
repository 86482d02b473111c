"""The parts of a table predicted by many machines: Ray Data hands them out, and again where a machine is lost."""

import logging
import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from isthmus.deploy.answers import Table
from isthmus.deploy.predict import Order, Pace, Tell, answered
from isthmus.errors import MissingExtraError, RunError
from isthmus.messages import first_line

__all__ = ["spread"]

PATIENCE = 10.0  # seconds for a machine to answer


def check_reachable(address: str) -> None:
    """Raise OSError where HOST:PORT answers nobody; Ray itself would go on trying."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdecimal() and "/" not in address:
        socket.create_connection((host.strip("[]"), int(port)), PATIENCE).close()


def reason(error: Exception) -> str:
    """What was raised where a worker ran, out of the traceback that Ray makes of it."""
    found = re.search(r"^[\w.]*?(\w+(?:Error|Exception): .+)$", str(error), re.MULTILINE)
    return found[1] if found else first_line(error)


class Worker:
    """Predicts whole parts with the cores that it was given."""

    def __init__(self, order: Order, cores: int, encode: Callable[[Table], bytes]) -> None:
        torch.set_num_threads(cores)
        self.order, self.cores, self.encode, self.reader = order, cores, encode, order.reader()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """A part as the bytes of a file, and the reasons of what cannot be read in it."""
        (answers,) = answered(self.order, self.reader, [row["part"]], Pace(), threads=self.cores)
        return row | {"table": self.encode(self.order.wanted.table(answers)), "reasons": answers.reasons}


def spread(
    order: Order,
    parts: Sequence[int],
    encode: Callable[[Table], bytes],
    address: str,
    workers: int,
    pace: Pace,
    tell: Tell,
) -> Iterator[tuple[int, bytes, list[str]]]:
    """Parts as they are done, in any order: number, bytes of a file, reasons of what cannot be read.

    `address` is a Ray cluster's, "auto" for the one that this machine is part of, "local" for one of its own. There is
    one worker a machine (on GPUs, one a GPU), or as many as `workers` says, and they share all cores alike. Every
    machine must see the files of the pictures under the same paths. Raises RunError where the cluster cannot be reached
    or one of its workers cannot predict, MissingExtraError.
    """
    if not parts:
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it tells its makers of each use otherwise
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingExtraError("ray", "cluster") from error
    others = ray.is_initialized()  # who began it will end it
    dashboard = False if address == "local" else None
    try:
        check_reachable(address)
        ray.init(
            address,
            include_dashboard=dashboard,
            log_to_driver=False,
            logging_level=logging.ERROR,
            ignore_reinit_error=True,
        )
    except Exception as error:  # it has many
        raise RunError(
            f"there is no Ray cluster at {address}: {first_line(error)}; begin one by `ray start`"
        ) from error
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
        scarce = "GPU" if order.device == "cuda" else "CPU"
        machines = [node["Resources"] for node in nodes if node["Alive"] and node["Resources"].get(scarce)]
        if not machines:
            raise RunError(f"no machine of the Ray cluster at {address} has a {scarce}: choose another --device")
        count = workers or (int(sum(each["GPU"] for each in machines)) if scarce == "GPU" else len(machines))
        cores = max(1, int(min(each["CPU"] for each in machines)) // -(-count // len(machines)))
        rows = ray.data.from_items([{"part": part} for part in parts], override_num_blocks=len(parts)).map(
            Worker,  # type: ignore[arg-type]
            fn_constructor_args=(order, cores, encode),
            compute=ray.data.ActorPoolStrategy(size=min(count, len(parts))),
            num_cpus=cores,
            num_gpus=1 if scarce == "GPU" else None,
        )
        every = sum(len(order.places(part)) for part in parts)
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # it tells of its plans
        for row in rows.iter_rows():
            pace.pictures += len(order.places(row["part"]))
            pace.unreadable += len(row["reasons"])
            tell(pace.pictures, every, {})
            yield int(row["part"]), bytes(row["table"]), list(row["reasons"])
    except ray.exceptions.RayError as error:
        raise RunError(f"a worker of the Ray cluster cannot predict: {reason(error)}") from error
    finally:
        if not others:
            ray.shutdown()
