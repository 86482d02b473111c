"""What goes wrong in one of two processes: `python rank_faults.py FAULT` in each; errors end as in the command line."""

import os
import signal
import sys
import threading

from isthmus.errors import DataError, IsthmusError
from isthmus.train.distributed import World, joined


def killed(world: World) -> None:
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def hanging(world: World) -> None:
    if world.rank == 1:
        threading.Event().wait(60)


def user_error(world: World) -> None:
    if world.rank == 1:
        raise DataError("picture 7 cannot be read")


def same_error(world: World) -> None:
    raise DataError("there is no such folder")


def bug(world: World) -> None:
    if world.rank == 1:
        raise KeyError("a name")


def leaving(world: World) -> None:
    if world.rank == 1:
        sys.exit(0)


if __name__ == "__main__":
    try:
        with joined() as world:
            world.any(False, "the first step")
            globals()[sys.argv[1]](world)
            world.any(False, "the second step")
    except IsthmusError as error:
        sys.stderr.write(f"isthmus: {error}\n")
        sys.exit(2)
