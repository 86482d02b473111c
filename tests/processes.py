"""Python scripts as several processes that meet on this machine, with or without torchrun."""

import os
import subprocess
import sys
from pathlib import Path

from torch.distributed import TCPStore

HERE = Path(__file__).parent
NOT_INHERITED = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "ISTHMUS_TIMEOUT"}


def environment(**more: str) -> dict[str, str]:
    """The environment of a script that finds the helpers of the tests and knows of no other processes."""
    kept = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
    places = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    return kept | {"PYTHONPATH": places, "PYTHONWARNINGS": "error"} | more


class Processes:
    """`ranks` processes of one script, and the store they meet at, which outlives each of them as torchrun's does."""

    def __init__(self, script: Path, *arguments: str, ranks: int = 2, timeout: float = 300) -> None:
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        common = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "ISTHMUS_TIMEOUT": str(timeout),
        }
        self.ranks = [
            subprocess.Popen(
                [sys.executable, str(script), *arguments],
                env=environment(**common, RANK=str(rank), LOCAL_RANK=str(rank)),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(ranks)
        ]

    def wait(self) -> list[tuple[int, str, str]]:
        """Exit status, standard output and standard error of every rank, in their order."""
        try:
            texts = [process.communicate(timeout=300) for process in self.ranks]
        finally:
            for process in self.ranks:
                process.kill()
        return [(process.returncode, *text) for process, text in zip(self.ranks, texts, strict=True)]


def torchrun(*command: str, ranks: int = 2, restarts: int = 0, **more: str) -> subprocess.Popen[str]:
    """A command under the real torchrun, on this machine alone."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", f"--max-restarts={restarts}"]
    return subprocess.Popen(
        [sys.executable, *launch, *command],
        env=environment(**more) | {"PYTHONWARNINGS": "default"},  # torchrun's own warnings are its own affair
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
