"""What the machine is asked for."""

import os
import platform
import subprocess
import sys

import pytest

from isthmus.runtime import cores

CODE = """
import resource, torch
from isthmus.runtime import keep_freed_memory
assert keep_freed_memory()
for turn in range(8):
    torch.ones(2**25)  # 128 MiB
    if turn == 3:  # the heap has grown to what is needed
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an allocator without these settings")
def test_kept_memory_is_not_faulted_in_again():
    """Four tensors of 128 MiB would be 131,072 pages, or 256 huge ones."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64


def test_processes_of_one_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    found = [cores()]
    for processes in ("4", "5", "16"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        found.append(cores())
    assert found == [12, 3, 2, 1]
