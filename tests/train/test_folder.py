"""Folders of runs: one command at a time, a number of one's own, and what a path means however it is spelt."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from isthmus.data.sources import open_data
from isthmus.errors import RecipeError, RunError
from isthmus.evaluation.metrics import Tally
from isthmus.run import evaluate
from isthmus.run import fit as fit_and_report
from isthmus.train.distributed import World
from isthmus.train.folder import claimed, free_folder
from isthmus.train.recipes import recipe
from isthmus.train.reporter import Reporter
from small_runs import class_folders, weights

fit = partial(fit_and_report, report=False)  # reports have tests of their own
HOLDS = """
import sys
from pathlib import Path
from isthmus.train.distributed import World
from isthmus.train.folder import claimed
from isthmus.train.reporter import Reporter
with claimed(Path(sys.argv[1]), World(), Reporter()):
    print("mine", flush=True)
    sys.stdin.read()
"""


TAKES_A_NUMBER = """
from isthmus.train.distributed import World
from isthmus.train.folder import free_folder
print(free_folder(World()))
"""


class Recorder(Reporter):
    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return class_folders(tmp_path_factory.mktemp("set") / "pictures", {"flower": 8, "temple": 8})


@pytest.fixture(scope="module")
def chosen(pictures, tmp_path_factory):
    start = weights(tmp_path_factory.mktemp("start") / "net.safetensors")
    return recipe("linear-probe", data=str(pictures), weights=str(start))


def test_another_command_may_not_train_in_the_folder(tmp_path):
    folder = tmp_path / "run"
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "mine\n"
    with pytest.raises(RunError, match=r"another command trains in .*run now"), claimed(folder, World(), Reporter()):
        pass
    other.kill()  # the system gives the lock back
    other.wait()
    for stream in (other.stdin, other.stdout):
        stream.close()
    with claimed(folder, World(), Reporter()):
        pass


def test_a_number_is_given_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    started = [
        subprocess.Popen([sys.executable, "-c", TAKES_A_NUMBER], stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    found = [process.communicate()[0].strip() for process in started]
    assert sorted(found) == [os.path.join("runs", str(number)) for number in (1, 2, 3, 4)]  # noqa: PTH118
    assert free_folder(World()) == Path("runs/5")


@pytest.mark.parametrize("place", ["", "here"])
def test_a_run_does_not_lie_among_its_pictures(chosen, pictures, place):
    before = sorted(pictures.rglob("*"))
    with pytest.raises(RunError, match="where its files would be taken for classes"):
        fit(chosen, pictures / place)
    assert sorted(pictures.rglob("*")) == before


def test_a_finished_run_says_so_and_stays(chosen, tmp_path):
    made, recorder = fit(chosen, tmp_path / "run"), Recorder()
    before = {path: path.read_bytes() for path in made.folder.rglob("*") if path.is_file()}
    again = fit(chosen, tmp_path / "run", resume=True, reporter=recorder)
    assert recorder.lines == [
        f"{made.folder} is finished; to train on, begin another run from it: --weights {made.folder}"
    ]
    assert again.scores.to_dict() == made.scores.to_dict()
    assert {path: path.read_bytes() for path in made.folder.rglob("*") if path.is_file()} == before


def test_scores_read_back(chosen, tmp_path):
    made = fit(chosen, tmp_path / "run")
    written = json.loads((made.folder / "evaluation.json").read_text())
    assert Tally.from_dict(written).to_dict() == made.scores.to_dict()


@pytest.mark.parametrize("spelt", ["{}", "{}/", "./{}", "/{}"])
def test_a_run_knows_its_pictures_however_they_are_spelt(chosen, pictures, tmp_path, monkeypatch, spelt):
    monkeypatch.chdir(pictures.parent)
    near = replace(chosen, data=pictures.name)
    made, recorder = fit(near, tmp_path / "run"), Recorder()
    path = spelt.format(pictures if spelt == "/{}" else pictures.name).replace("//", "/")
    scores = evaluate(made.folder, path, reporter=recorder)
    held_out = len(open_data(near.data, val_fraction=near.val_fraction, seed=near.seed).val)
    assert (scores.seen, recorder.lines) == (held_out, [f"{held_out} validation pictures of {pictures.name}"])


def test_mistakes_are_found_before_there_is_a_folder(chosen, tmp_path):
    for wrong in ({"resized": 16}, {"resized": 31, "image_size": 32}):
        with pytest.raises(RecipeError, match="a crop is no larger than its picture"):
            fit(replace(chosen, name="", freeze="none", **wrong), tmp_path / "run")
    assert not (tmp_path / "run").exists()
