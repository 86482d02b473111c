"""The commands train, eval and predict: what they take and print, how they refuse, and Ctrl-C."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from isthmus.cli.main import app
from isthmus.evaluation.mistakes import Mistake
from isthmus.train.recipe import Recipe
from small_runs import SPEC, class_folders, network, read, same_files, weights

MEASURED = dict.fromkeys(("memory", "pictures_per_second", "time"), 0)  # differs from run to run


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("isthmus.run.reported", lambda *_: None)  # reports have tests of their own


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "isthmus", *arguments]


def test_options(golden):
    """A line an option: scripts depend on them."""
    lines = []
    for name in ("train", "eval", "predict", "env"):
        lines += [name]
        for argument in app[name].assemble_argument_collection(parse_docstring=True):
            kind = " | ".join(argument.get_choices() or ()) or getattr(argument.hint, "__name__", str(argument.hint))
            place = "" if argument.index is None else ", by place"
            usual = "needed" if argument.required else f"= {argument.field_info.default!r}"
            lines.append(f"  {argument.names[0]} ({kind}{place}) {usual}")
            assert argument.parameter.help, argument.names
    golden("commands_work.txt", "\n".join(lines))


# --- what they print


def test_from_pictures_to_predictions(isthmus, pictures, plain, tmp_path):
    out = str(tmp_path / "run")
    trained = isthmus("train", "--data", str(pictures), "--weights", str(plain), "--head", "linear", "--out", out)
    assert trained.status == 0
    assert "18 pictures to train on (8 flower, 10 temple), 6 to validate on" in trained.err
    assert "accuracy" in trained.out
    assert "as flower" in trained.out
    assert f"Use it: isthmus predict {out} PICTURES" in trained.out

    measured = isthmus("eval", out)
    assert measured.status == 0
    assert measured.out in trained.out  # the same scores and the same matrix

    table = tmp_path / "predictions.csv"
    told = isthmus("predict", out, str(pictures / "flower"), "--out", str(table), "--top", "1")
    assert told.status == 0
    assert told.err.startswith("10 pictures in ")
    assert told.out == f"{table}: 10 rows\n"
    with table.open(newline="") as file:
        assert [row["path"] for row in csv.DictReader(file)] == [
            str(pictures / "flower" / f"{number}.{'png' if number % 2 else 'jpg'}") for number in range(10)
        ]


def test_json_is_all_of_the_output(isthmus, pictures, plain, tmp_path):
    out = str(tmp_path / "run")
    given = ("--data", str(pictures), "--weights", str(plain), "--recipe", "finetune", "--epochs", "1", "--json")
    trained = json.loads(isthmus("train", *given, "--head", "linear", "--out", out).out)
    assert trained["run"] == out
    assert trained["seconds"] > 0
    measured = json.loads(isthmus("eval", out, "--json").out)
    assert measured == {name: value for name, value in trained.items() if name not in ("run", "seconds")}
    kept = {"pictures", "loss", "accuracy", "balanced_accuracy", "calibration", "per_class", "confusion"}
    assert set(measured) - {"mistakes"} == kept
    whole = json.loads(
        isthmus("eval", str(tmp_path / "run" / "model.safetensors"), "--data", str(pictures), "--json").out
    )
    assert whole["pictures"] == 24
    told = json.loads(isthmus("predict", out, str(pictures), "--json").out)
    assert len(told) == 24
    assert {tuple(sorted(row["classes"])) for row in told} == {("flower", "temple")}
    assert all(sum(row["classes"].values()) == pytest.approx(1, abs=1e-5) for row in told)
    assert {row["error"] for row in told} == {""}


def test_the_docs_name_every_field_of_a_run(isthmus, pictures, plain, tmp_path):
    told = (Path(__file__).parents[2] / "docs" / "files.md").read_text()

    def named(file: str) -> set[str]:
        return set(re.findall(r"`(\w+)`", told.partition(f"## `{file}`")[2].partition("\n## ")[0]))

    given = ("--data", str(pictures), "--weights", str(plain))
    tuning = ("--freeze", "none", "--head", "linear", "--epochs", "1", "--set", "clip_norm=1.0")
    logged = set()
    for number, options in enumerate([(), tuning]):
        out = tmp_path / str(number)
        assert isthmus("train", *given, *options, "--out", str(out)).status == 0
        logged |= {name for line in (out / "log.jsonl").read_text().splitlines() for name in json.loads(line)}
    assert logged == named("log.jsonl") - {"clip_norm"}
    scores = json.loads((out / "evaluation.json").read_text())
    inside = {*scores["per_class"][0], *scores["calibration"], *(each.name for each in fields(Mistake))}
    assert {*scores, *inside, "mistakes", "top5"} == named("evaluation.json")


def test_options_reach_the_recipe(isthmus, pictures, plain, tmp_path):
    given = {
        "--data": str(pictures), "--weights": str(plain), "--freeze": "layer1", "--epochs": "1", "--batch-size": "5",
        "--lr": "0.002", "--image-size": "24", "--head": "linear", "--val-fraction": "0.5", "--seed": "3",
    }  # fmt: skip
    settings = ("--set", "augment.vflip=true", "--set", 'views=["identity"]', "--set", "warmup_epochs=0")
    first = tmp_path / "first"
    assert (
        isthmus("train", *[part for pair in given.items() for part in pair], *settings, "--out", str(first)).status == 0
    )
    found = Recipe.from_file(first / "recipe.toml")
    assert (found.name, found.freeze, found.epochs, found.batch_size, found.lr) == ("finetune", "layer1", 1, 5, 0.002)
    assert (found.image_size, found.head, found.val_fraction, found.seed) == (24, "linear", 0.5, 3)
    assert (found.augment.vflip, found.views, found.warmup_epochs) == (True, ("identity",), 0)

    second = tmp_path / "second"  # its recipe, with one setting changed
    result = isthmus("train", "--recipe", str(first / "recipe.toml"), "--lr", "0.001", "--out", str(second))
    assert result.status == 0
    assert Recipe.from_file(second / "recipe.toml") == replace(found, lr=0.001)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ((), "probe"),
        (("--freeze", "trunk"), "probe"),
        (("--freeze", "none"), "finetune"),
        (("--freeze", "layer1"), "finetune"),
        (("--recipe", "linear-probe"), "linear-probe"),
    ],
)
def test_the_usual_recipe(isthmus, monkeypatch, plain, given, name):
    seen = []
    monkeypatch.setattr("isthmus.run.fit", lambda chosen, *_, **__: seen.append(chosen) or sys.exit(7))
    assert isthmus("train", "--data", "x", "--weights", str(plain), *given).status == 7
    assert seen[0].name == name


def test_without_weights_a_network_starts_from_scratch(isthmus, monkeypatch):
    seen = []
    monkeypatch.setattr("isthmus.run.fit", lambda chosen, *_, **__: seen.append(chosen) or sys.exit(7))
    assert isthmus("train", "--data", "x", "--arch", "resnet50", "--epochs", "2").status == 7
    assert (seen[0].name, seen[0].freeze, seen[0].epochs) == ("scratch", "none", 2)


def test_unreadable_pictures_are_told_at_the_end(isthmus, linear, pictures, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_text("no picture")
    result = isthmus("predict", str(linear), str(broken), str(pictures / "flower" / "1.png"))
    assert result.status == 0
    assert "1.png" in result.out
    assert "broken.jpg" not in result.out
    first, last = result.err.splitlines()
    assert first.startswith(f"skipped {broken} is not a picture")
    assert last == "1 of 2 pictures could not be read"
    told = json.loads(isthmus("predict", str(linear), str(broken), str(pictures / "flower" / "1.png"), "--json").out)
    assert [bool(row["error"]) for row in told] == [True, False]


def test_names_with_brackets_are_printed_as_they_are(isthmus, plain, tmp_path):
    """They are no markup: neither swallowed nor an error."""
    class_folders(tmp_path, {"flower": 6, "temple": 6})
    root = tmp_path / "set [old]"
    root.mkdir()
    (tmp_path / "flower").rename(root / "[bold]red")
    (tmp_path / "temple").rename(root / "x[b]")
    out = tmp_path / "run [new]"
    result = isthmus("train", "--data", str(root), "--weights", str(plain), "--head", "linear", "--out", str(out))
    assert result.status == 0
    assert "(4 [bold]red, 4 x[b])" in result.err
    assert "[bold]red" in result.out
    assert str(out) in result.out
    picture = next((root / "x[b]").iterdir()).rename(root / "x[b]" / "[i]a.jpg")
    told = isthmus("predict", str(out), str(picture))
    assert "[i]a.jpg" in told.out
    assert "[bold]red" in told.out


# --- how they refuse


class Runs:
    """Runs code when a careless reader unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def empty_class(root: Path) -> None:
    class_folders(root, {"flower": 3, "temple": 3})
    (root / "nothing").mkdir()


def weights_of_code(root: Path) -> None:
    torch.save({"state_dict": Runs(root.parent / "ran")}, root)


def weights_truncated(root: Path) -> None:
    weights(root)
    root.write_bytes(root.read_bytes()[:-99])


def weights_misnamed(root: Path) -> None:
    weights(root)
    tensors, facts = read(root)
    facts["isthmus"] = json.dumps(json.loads(facts["isthmus"]) | {"classes": ["a", "b", "c"]})
    save_file(tensors, root, facts)


def nothing(root: Path) -> None:
    pass


REFUSED = {
    # what is there, the arguments (NEW is that), the culprit, the mend
    "no data": (nothing, ("--weights", "START"), "--data is missing", "a folder of class folders or shards"),
    "missing folder": (nothing, ("--data", "NEW", "--weights", "START"), "NEW does not exist", "name a folder"),
    "empty class": (empty_class, ("--data", "NEW", "--weights", "START"), "['nothing'] hold no", "fill them or remove"),
    "one class": (
        lambda root: class_folders(root, {"flower": 3}),
        ("--data", "NEW", "--weights", "START"),
        "NEW has one class, ['flower']",
        "needs two or more",
    ),
    "no start": (nothing, ("--data", "DATA"), "neither weights nor arch is given", "name one"),
    "unknown network": (nothing, ("--data", "DATA", "--arch", "resnet51"), "resnet51", "resnet50"),
    "truncated": (weights_truncated, ("--data", "DATA", "--weights", "NEW"), "NEW is truncated", "save it again"),
    "code": (weights_of_code, ("--data", "DATA", "--weights", "NEW", "--arch", "resnet50"), "NEW holds Python", "save"),
    "misnamed": (
        weights_misnamed,
        ("--data", "DATA", "--weights", "NEW"),
        "NEW names 3 classes for 7 outputs",
        "save it again",
    ),
    "unknown recipe": (
        nothing,
        ("--data", "DATA", "--weights", "START", "--recipe", "magic"),
        "no recipe 'magic'",
        "known: probe",
    ),
    "missing recipe": (nothing, ("--data", "DATA", "--recipe", "NEW.toml"), "NEW.toml", "No such file"),
    "bad recipe": (
        lambda root: root.with_suffix(".toml").write_text('data = "x"\nspeed = 3\n'),
        ("--recipe", "NEW.toml"),
        "NEW.toml: unknown setting speed",
        "known: data",
    ),
    "bad setting": (
        nothing,
        ("--data", "DATA", "--weights", "START", "--set", "speed=3"),
        "'speed=3'",
        "known: data, weights",
    ),
    "no value": (nothing, ("--data", "DATA", "--weights", "START", "--set", "lr"), "'lr'", "e.g. lr=0.01"),
    "bad value": (nothing, ("--data", "DATA", "--weights", "START", "--set", "ema=2"), "ema is 2", "[0, 1)"),
    "bad rate": (nothing, ("--data", "DATA", "--weights", "START", "--lr", "-1"), "lr is -1.0", "above 0"),
    "freezing": (
        nothing,
        ("--data", "DATA", "--weights", "START", "--freeze", "layer7"),
        "'layer7'",
        "known: none, stem",
    ),
    "unwritable": (
        lambda root: root.write_text("a file"),
        ("--data", "DATA", "--weights", "START", "--out", "NEW/run"),
        "cannot make the folder NEW/run",
        "choose another --out",
    ),
    "device": (
        nothing,
        ("--data", "DATA", "--weights", "START", "--device", "tpu"),
        "device 'tpu'",
        "this machine has",
    ),
    "resume nothing": (nothing, ("--resume", "NEW"), "NEW holds no run to resume", "recipe.toml is missing"),
    "resume with options": (
        nothing,
        ("--resume", "NEW", "--batch-size", "4", "--set", "ema=0.9", "--out", "x", "--seed", "0"),
        "leave out --batch-size, --seed, --out, --set,",
        "begin a new run from it with --weights",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_train_refuses_with_one_message(isthmus, pictures, plain, tmp_path, monkeypatch, name):
    make, arguments, culprit, mend = REFUSED[name]
    monkeypatch.chdir(tmp_path)
    new = tmp_path / "new"
    make(new)
    before = sorted(tmp_path.rglob("*"))

    def filled(text: str) -> str:
        return text.replace("NEW", str(new)).replace("DATA", str(pictures)).replace("START", str(plain))

    result = isthmus("train", *map(filled, arguments))
    assert (result.status, result.out) == (2, "")
    assert result.err.startswith("isthmus: ")
    assert result.err.count("\n") == 1
    assert filled(culprit) in result.err
    assert mend in result.err
    assert sorted(tmp_path.rglob("*")) == before  # nothing was written, and code in a file did not run


def test_a_run_is_not_overwritten(isthmus, linear, pictures, plain):
    before = {path: path.read_bytes() for path in linear.iterdir()}
    result = isthmus("train", "--data", str(pictures), "--weights", str(plain), "--out", str(linear))
    assert result.status == 2
    assert (
        result.err == f"isthmus: {linear} holds a run already; choose another --out, or go on with --resume {linear}\n"
    )
    assert {path: path.read_bytes() for path in linear.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (("eval", "NEW"), "there is no file NEW"),
        (("eval", "RUN", "--data", "NEW"), "NEW does not exist"),
        (("eval", "RUN", "--data", "OTHER"), "does not know the classes ['brick']; it knows flower, temple"),
        (("eval", "START"), "name the pictures with --data"),
        (("predict", "NEW", "DATA"), "there is no file NEW"),
        (("predict", "RUN", "NEW"), "NEW does not exist"),
        (("predict", "RUN", "DATA", "--top", "0"), "top is 0"),
        (("predict", "RUN", "DATA", "--out", "NEW/x.csv"), "there is no folder NEW"),
        (("predict", "RUN", "RUN/recipe.toml"), "none of 1 pictures can be read"),
    ],
)
def test_eval_and_predict_refuse_with_one_message(isthmus, linear, pictures, plain, tmp_path, arguments, culprit):
    class_folders(tmp_path / "other", {"flower": 2, "brick": 2})
    places = {
        "NEW": tmp_path / "new", "RUN": linear, "DATA": pictures, "START": plain, "OTHER": tmp_path / "other",
    }  # fmt: skip

    def filled(text: str) -> str:
        for word, place in places.items():
            text = text.replace(word, str(place))
        return text

    result = isthmus(*map(filled, arguments))
    assert (result.status, result.out) == (2, "")
    assert result.err.startswith("isthmus: ")
    assert result.err.count("\n") == 1
    assert filled(culprit) in result.err


def test_a_picture_that_fails_while_evaluating_is_named(isthmus, linear, tmp_path):
    root = class_folders(tmp_path / "set", {"flower": 3, "temple": 3})
    (root / "flower" / "9.jpg").write_text("no picture")
    result = isthmus("eval", str(linear), "--data", str(root))
    assert result.status == 2
    said, told = result.err.splitlines()
    assert said == f"7 pictures, all of {root}"
    assert f"{root / 'flower' / '9.jpg'} is not a picture" in told


@pytest.mark.parametrize(
    "arguments", [("train", "--speed", "3"), ("train", "--epochs", "few"), ("predict",), ("eval",)]
)
def test_bad_options_are_named(isthmus, arguments):
    result = isthmus(*arguments)
    assert (result.status, result.out) == (2, "")
    assert result.err.count("Error") == 1
    assert "Traceback" not in result.err


# --- as a process


def test_the_process_ends_with_2_and_one_line(pictures, tmp_path):
    path = tmp_path / "code.pth"
    torch.save({"state_dict": Runs(tmp_path / "ran")}, path)
    given = ("--data", str(pictures), "--weights", str(path), "--arch", "test_resnet")
    ended = subprocess.run(command("train", *given), capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith(f"isthmus: {path} holds Python objects")
    assert ended.stderr.count("\n") == 1
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "runs").exists()


def test_ctrl_c_saves_and_the_rest_gives_the_same_model(isthmus, pictures, tmp_path):
    start = weights(tmp_path / "start.safetensors", network(replace(SPEC, drop_path=0.2)))
    given = ("--data", str(pictures), "--weights", str(start), "--freeze", "none", "--head", "linear", "--lr", "0.001")
    given += ("--epochs", "12", "--batch-size", "3", "--set", "precision=fp32", "--set", "ema=0.9")
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert isthmus("train", *given, "--out", str(straight)).status == 0

    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # as here, so that sums are taken in the same order
    with subprocess.Popen(
        command("train", *given, "--no-report", "--out", str(stopped)),
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        assert any(line.startswith("epoch 2/12: loss") for line in lines)
        process.send_signal(signal.SIGINT)
        told = list(lines)
    assert process.returncode == 130
    assert f"go on with: isthmus train --resume {stopped}" in told[-1]
    assert "Traceback" not in "".join(told)
    assert not (stopped / "model.safetensors").exists()
    refused = isthmus("predict", str(stopped), str(pictures))
    assert refused.status == 2
    assert "the run is not finished: take " in refused.err

    assert isthmus("train", "--resume", str(stopped)).status == 0
    assert same_files(straight / "model.safetensors", stopped / "model.safetensors")
    logs = [
        [json.loads(line) | MEASURED for line in (folder / "log.jsonl").read_text().splitlines()]
        for folder in (straight, stopped)
    ]
    assert logs[0] == logs[1]
    assert sum("step" not in row for row in logs[0]) == 12
