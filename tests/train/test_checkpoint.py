"""States on the disk: whole or not at all, checked when read, and one before the damaged one to go on from."""

import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import isthmus
from isthmus.errors import RunError
from isthmus.train.checkpoint import BEST, Checkpoints, load_state, random_state, restore_random_state, save_state
from small_runs import Recorder, network

STATE = {
    "net": {"weight": torch.arange(600.0).view(20, 30), "half": torch.ones(5, dtype=torch.bfloat16)},
    "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]},
    "epoch": 2,
    "log": 1234,
}


def equal(one, other) -> bool:
    """Whether nested states are equal to the last bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def limited():
    """Files of this process may not grow past 40,000 bytes; the system refuses as a full disk does, in the middle."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_state_comes_back_as_it_was(tmp_path):
    save_state(tmp_path / "a.pt", STATE)
    assert equal(load_state(tmp_path / "a.pt"), STATE | {"schema": 2})


def test_any_flipped_bit_is_found_or_without_consequence(tmp_path):
    path = tmp_path / "a.pt"
    save_state(path, STATE)
    sound, wanted, refused = path.read_bytes(), load_state(path), 0
    for place in range(0, len(sound), 7):
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 1 << place % 8]) + sound[place + 1 :])
        try:
            assert equal(load_state(path), wanted), place  # the padding between two records
        except RunError as error:
            assert str(path) in str(error)  # noqa: PT017 - either way is right
            refused += 1
    tensors = 600 * 4 + 5 * 2
    assert refused > tensors // 7


def test_any_length_but_the_whole_is_refused(tmp_path):
    path = tmp_path / "a.pt"
    save_state(path, STATE)
    sound = path.read_bytes()
    for length in range(0, len(sound), 97):
        path.write_bytes(sound[:length])
        with pytest.raises(RunError, match="damaged or no checkpoint"):
            load_state(path)


def test_the_last_few_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3)
    assert checkpoints.latest(Recorder()) is None
    for step in (5, 10, 999, 1000, 1000):
        checkpoints.save(STATE | {"epoch": step}, step=step)
    assert [path.name for path in checkpoints.files()] == [f"step-{step:09d}.pt" for step in (1000, 999, 10)]
    assert checkpoints.latest(Recorder())["epoch"] == 1000
    assert checkpoints.save(STATE, step=2000) == checkpoints.files()[0]


def test_the_one_before_a_damaged_one_is_used_and_told(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        checkpoints.save(STATE | {"epoch": step}, step=step)
    newest, middle, _ = checkpoints.files()
    content = bytearray(newest.read_bytes())
    content[content.index(torch.arange(600.0).numpy().tobytes()) + 100] ^= 4
    newest.write_bytes(content)
    middle.write_bytes(middle.read_bytes()[:-9])
    reporter = Recorder()
    assert checkpoints.latest(reporter)["epoch"] == 1
    assert [line.split("; ")[1] for line in reporter.lines] == ["going on from step-000000001.pt"] * 2
    assert "step-000000003.pt is damaged: " in reporter.lines[0]
    assert "does not have its checksum" in reporter.lines[0]
    # Going on from there, the damaged ones are of a future that is written anew.
    checkpoints.save(STATE | {"epoch": 20}, step=2)
    assert names(checkpoints.folder) == ["step-000000001.pt", "step-000000002.pt"]
    assert checkpoints.latest(reporter)["epoch"] == 20


def test_when_none_can_be_read_all_are_named(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(STATE, step=step).write_bytes(b"")
    with pytest.raises(RunError, match=r"step-000000002\.pt is damaged.*step-000000001\.pt is damaged.*start the run"):
        checkpoints.latest(Recorder())


def test_a_run_of_an_earlier_version_is_named(tmp_path):
    torch.save({"schema": 1}, tmp_path / "checkpoint.pt")
    with pytest.raises(RunError, match=r"checkpoint\.pt is of an earlier version"):
        Checkpoints(tmp_path).latest(Recorder())


def test_a_full_disk_leaves_the_states_before(tmp_path, limited):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        checkpoints.save(STATE, step=step)
    before = {path: path.read_bytes() for path in checkpoints.files()}
    with pytest.raises(RunError, match=r"cannot write .*step-000000004\.pt: File too large; nothing was changed"):
        checkpoints.save(STATE | {"more": torch.zeros(100_000)}, step=4)
    assert {path: path.read_bytes() for path in checkpoints.folder.iterdir()} == before
    assert equal(checkpoints.latest(Recorder()), STATE | {"schema": 2})


def test_a_full_file_system_leaves_the_states_before(tmp_path):
    """A real one, of half a megabyte, where this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    made = mount and subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=512k", "tmpfs", folder], check=False, capture_output=True
    )
    if not made or made.returncode:
        pytest.skip("only root may mount a small file system")
    try:
        checkpoints = Checkpoints(folder)
        checkpoints.save(STATE, step=1)
        with pytest.raises(RunError, match=r"step-000000002\.pt: No space left on device; nothing was changed"):
            checkpoints.save(STATE | {"more": torch.zeros(1_000_000)}, step=2)
        assert names(checkpoints.folder) == ["step-000000001.pt"]
        checkpoints.save(STATE | {"epoch": 7}, step=3)  # what the attempt took is free again
        assert checkpoints.latest(Recorder())["epoch"] == 7
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_missing_run_folder_is_named(tmp_path):
    with pytest.raises(RunError, match=r"cannot make the folder .*gone.*: No such file or directory"):
        Checkpoints(tmp_path / "gone").save(STATE, step=1)


MOMENTS = {
    "in the middle of writing": "Path.open",
    "before the disk has it": "os.fsync",
    "before it has its name": "Path.replace",
    "before the oldest goes": "Path.unlink",
}
KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from isthmus.train.checkpoint import Checkpoints

checkpoints = Checkpoints(Path(sys.argv[1]))
for step in (1, 2, 3):
    checkpoints.save({"weights": torch.full((1000,), float(step))}, step=step)

def killed(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

class Dies:
    def __init__(self, file): self.file, self.left = file, 2000
    def __enter__(self): return self
    def __exit__(self, *_): self.file.close()
    def flush(self): self.file.flush()
    def write(self, data):
        self.left -= len(data)
        self.file.write(data)
        if self.left < 0:
            self.file.flush()
            killed()
        return len(data)

owner, name = sys.argv[2].split(".")
if name == "open":
    real = Path.open
    Path.open = lambda path, *mode, **options: Dies(real(path, *mode, **options))
else:
    setattr({"os": os, "Path": Path}[owner], name, killed)
checkpoints.save({"weights": torch.full((1000,), 4.0)}, step=4)
"""


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_while_saving(tmp_path, moment):
    """SIGKILL in a real process at each step of a save: before the rename the old state is the last, then the new."""
    script = [sys.executable, "-c", KILLED, str(tmp_path), MOMENTS[moment]]
    died = subprocess.run(script, capture_output=True, text=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr
    checkpoints, reporter = Checkpoints(tmp_path), Recorder()
    renamed = moment == "before the oldest goes"
    assert checkpoints.latest(reporter)["weights"].unique().tolist() == [4.0 if renamed else 3.0]
    assert reporter.lines == []
    left = [name for name in names(checkpoints.folder) if name.endswith(".tmp")]
    assert len(left) == (not renamed)
    checkpoints.save(STATE, step=4)
    assert names(checkpoints.folder) == [f"step-00000000{step}.pt" for step in (2, 3, 4)]


def test_code_in_a_state_does_not_run(tmp_path):
    class Runs:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"schema": 2, "net": Runs()}, tmp_path / "a.pt")
    with pytest.raises(RunError, match="damaged or no checkpoint"):
        load_state(tmp_path / "a.pt")
    assert not (tmp_path / "ran").exists()


def test_the_best_weights_are_those_of_one_epoch(tmp_path):
    checkpoints, rows = Checkpoints(tmp_path), []
    for epoch, (seed, accuracy, better) in enumerate(
        [(1, 0.5, True), (2, 0.7, True), (3, 0.6, False), (4, 0.7, False)]
    ):
        rows += [{"epoch": epoch, "step": 10 * epoch, "loss": 1.0}, {"epoch": epoch, "val_accuracy": accuracy}]
        assert checkpoints.save_best(network(seed=seed), rows) is better
    best = isthmus.load(tmp_path / BEST)
    wanted = network(seed=2).state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in best.state_dict().items())


def test_random_numbers_go_on_as_they_were():
    device = torch.device("cpu")
    state = random_state(device)
    wanted = torch.rand(5)
    restore_random_state(state, device)
    assert torch.equal(torch.rand(5), wanted)
