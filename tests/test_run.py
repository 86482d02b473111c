"""Runs: what is left behind, how it is measured and used again, and what a bad start leaves behind: nothing."""

import errno
import io
import json
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score

import isthmus
from isthmus.data.augment import Augment
from isthmus.data.sources import DataSet, open_data
from isthmus.errors import DataError, IsthmusError, RunError, SpecError, WeightsError
from isthmus.nn.fold import fold
from isthmus.run import evaluate
from isthmus.run import fit as fit_and_report
from isthmus.ship import predict
from isthmus.train.recipe import Recipe
from isthmus.train.recipes import recipe
from isthmus.train.reporter import Reporter
from isthmus.weights.files import WRITERS
from isthmus.weights.source import open_source
from small_runs import SPEC, Recorder, class_folders, copied, network, paths, same, same_files, weights

fit = partial(fit_and_report, report=False)  # reports have tests of their own
LEFT = {".lock", "recipe.toml", "environment.json", "evaluation.json", "log.jsonl", "model.safetensors"}
TRAINED = LEFT | {"best.safetensors", "checkpoints", "start.safetensors", "tensorboard"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def start(tmp_path_factory, plain) -> dict[str, Path]:
    """Weights of a network, of the same with its batch norm folded away (as in ONNX files), and one of two classes."""
    folder = tmp_path_factory.mktemp("weights")
    two = network(replace(SPEC, num_classes=2))
    two.classes = ("cat", "dog")
    preact = replace(SPEC, stages=tuple(replace(stage, block="preact_bottleneck") for stage in SPEC.stages))
    return {
        "plain": plain,
        "folded": weights(folder / "folded.safetensors", fold(network())),
        "preact, folded": weights(folder / "preact.safetensors", fold(network(preact))),
        "two": weights(folder / "two.safetensors", two),
    }


QUICK = {"epochs": 2, "batch_size": 6, "lr": 1e-3, "precision": "fp32"}
RECIPES = {
    "probe": ("probe", "plain", {}),
    "linear-probe": ("linear-probe", "plain", {}),
    "quick-probe": ("quick-probe", "plain", {"head": "layer1"}),  # the small network has two stages
    "probe, folded": ("probe", "folded", {"views": ("identity", "vflip"), "precision": "bf16"}),
    "finetune": ("finetune", "plain", QUICK),
    "finetune, folded": ("finetune", "folded", QUICK | {"ema": 0.9, "train_norm": True}),
    "finetune, pre-activation folded": ("finetune", "preact, folded", QUICK | {"train_norm": True}),
    "finetune, partly": ("finetune", "plain", QUICK | {"freeze": "layer2", "head": "linear"}),
    "scratch": ("scratch", "", QUICK | {"arch": "test_resnet", "image_size": 32, "lr": 0.05}),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_leaves_what_it_takes_to_use_it(name, pictures, start, tmp_path):
    named, origin, settings = RECIPES[name]
    made = recipe(named, data=str(pictures), weights=str(start[origin]) if origin else "", **settings)
    recorder = Recorder()
    run = fit(made, tmp_path / "run", reporter=recorder)

    assert run.folder == tmp_path / "run"
    assert {path.name for path in run.folder.iterdir()} == (LEFT if made.freeze == "trunk" else TRAINED)
    assert Recipe.from_file(run.folder / "recipe.toml") == made
    written = json.loads((run.folder / "evaluation.json").read_text())
    assert written == run.scores.to_dict() | {"data": str(pictures), "seconds": run.seconds}
    environment = json.loads((run.folder / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert environment["precision"] in ("fp32", "bf16")
    rows = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["val_accuracy"] == run.scores.accuracy
    assert recorder.lines[0] == "18 pictures to train on (8 flower, 10 temple), 6 to validate on"

    metrics = open_source(run.folder, None).extra["metrics"]
    assert metrics["validation accuracy"] == run.scores.accuracy

    net = isthmus.load(run.folder)
    assert net.classes == ("flower", "temple")
    assert (net.preprocess.crop, net.preprocess.resize, net.preprocess.views) == (32, 32, made.views)
    assert not net.training
    assert net.spec.norm == ("none" if name == "probe, folded" else "batch")

    # By a second way: every validation picture on its own, with labels from the names of their folders.
    val = open_data(str(pictures), val_fraction=made.val_fraction, seed=made.seed).val
    told = {row.path: row for row in predict(run.folder, *paths(val), precision=environment["precision"])}
    guesses = [told[path].classes[0] for path in paths(val)]
    truth = [path.parent.name for path in paths(val)]
    assert run.scores.seen == len(truth)
    assert run.scores.accuracy == pytest.approx(np.mean([a == b for a, b in zip(guesses, truth, strict=True)]))
    assert run.scores.balanced_accuracy == pytest.approx(balanced_accuracy_score(truth, guesses))

    again = evaluate(run.folder, precision=environment["precision"])
    assert torch.equal(again.confusion, run.scores.confusion)
    assert again.loss == pytest.approx(run.scores.loss, rel=1e-4)
    assert torch.equal(
        evaluate(run.folder, str(pictures), precision="fp32").confusion,
        evaluate(run.folder, precision="fp32").confusion,
    )


def test_the_log_of_a_probe_tells_of_every_candidate(pictures, start, tmp_path):
    recorder = Recorder()
    run = fit(recipe("probe", data=str(pictures), weights=str(start["plain"])), tmp_path / "run", reporter=recorder)
    *candidates, chosen = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    assert len(candidates) == sum(line.startswith("head on") for line in recorder.lines) > 1
    ranks = [(-row["accuracy"], row["loss"]) for row in candidates]
    assert ranks == sorted(ranks)
    assert chosen["taps"] == candidates[0]["taps"] == list(isthmus.load(run.folder).spec.head.taps)


def test_the_same_recipe_gives_the_same_model(pictures, start, tmp_path):
    for name in ("linear-probe", "finetune"):
        made = recipe(name, data=str(pictures), weights=str(start["plain"]), **(QUICK | {"epochs": 1}))
        one, two = (fit(made, tmp_path / f"{name}{number}") for number in (1, 2))
        assert same_files(one.folder / "model.safetensors", two.folder / "model.safetensors")
        assert one.scores.to_dict() == two.scores.to_dict()


def test_the_next_free_number_names_a_run(pictures, start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = recipe("linear-probe", data=str(pictures), weights=str(start["plain"]))
    assert [str(fit(made).folder) for _ in range(2)] == ["runs/1", "runs/2"]


def test_data_may_be_given_as_it_is(pictures, start, tmp_path):
    whole = open_data(str(pictures))
    data = DataSet(name="mine", train=whole.val, val=whole.train)
    run = fit(recipe("linear-probe", data="mine", weights=str(start["plain"])), tmp_path / "run", data=data)
    assert run.scores.seen == len(whole.train)
    assert json.loads((run.folder / "evaluation.json").read_text())["data"] == "mine"


@pytest.mark.parametrize("name", ["linear-probe", "finetune"])
def test_classes_keep_the_order_they_are_given_in(name, pictures, start, tmp_path):
    """Names that do not sort: the labels must not be taken for those of the sorted names."""
    sides = []
    for part in ("train", "val"):
        side = getattr(open_data(str(pictures)), part)
        sides.append(replace(side, classes=("temple", "flower"), labels=1 - side.labels))
    data = DataSet(name=str(pictures), train=sides[0], val=sides[1])
    made = recipe(name, data=str(pictures), weights=str(start["plain"]), head="linear", **(QUICK | {"epochs": 1}))
    run = fit(made, tmp_path / "run", data=data)
    assert isthmus.load(run.folder).classes == run.scores.classes == ("temple", "flower")
    guesses = [row.classes[0] for row in predict(run.folder, *paths(sides[1]), precision="fp32")]
    found = [guess == path.parent.name for guess, path in zip(guesses, paths(sides[1]), strict=True)]
    assert run.scores.accuracy == pytest.approx(np.mean(found))
    trained = [row.classes[0] == row.path.parent.name for row in predict(run.folder, *paths(sides[0]))]
    assert np.mean(trained) > 0.6 or name == "finetune"


def test_a_classifier_of_other_classes_is_not_kept(pictures, start, tmp_path):
    """Two classes there and two here, but not the same question."""
    made = recipe("finetune", data=str(pictures), weights=str(start["two"]), head="linear", **(QUICK | {"lr": 1e-9}))
    net = isthmus.load(fit(made, tmp_path / "run").folder)
    old = isthmus.load(start["two"])
    assert net.classes == ("flower", "temple")
    assert torch.allclose(net.conv1.weight, old.conv1.weight, atol=1e-4)
    assert not torch.allclose(net.fc.weight, old.fc.weight, atol=1e-2)


def test_partly_frozen_layers_stay(pictures, start, tmp_path):
    made = recipe("finetune", data=str(pictures), weights=str(start["plain"]), **(QUICK | {"freeze": "layer1"}))
    before, after = copied(network()), copied(isthmus.load(fit(made, tmp_path / "run").folder))
    kept = [name for name in after if name.startswith(("conv1", "bn1", "layer1"))]
    assert kept
    assert all(torch.equal(after[name], before[name]) for name in kept)


def test_freezing_deeper_than_the_head_reads(pictures, start, tmp_path):
    """A head on layer1 alone leaves layer2 out of the network; `freeze = layer2` then means all there is."""
    settings = QUICK | {"freeze": "layer2", "head": "layer1"}
    made = recipe("finetune", data=str(pictures), weights=str(start["plain"]), **settings)
    run = fit(made, tmp_path / "run")
    assert isthmus.load(run.folder).stages == ("layer1",)
    assert Recipe.from_file(run.folder / "recipe.toml") == made


def left_over(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


class TestBadStart:
    """Each is one error that names the culprit, and no folder is left behind."""

    @pytest.fixture
    def bad(self, pictures, start, tmp_path):
        def call(error: type[IsthmusError], message: str, out: str = "run", **settings) -> None:
            made = recipe("probe", **({"data": str(pictures), "weights": str(start["plain"])} | settings))
            with pytest.raises(error) as raised:
                fit(made, tmp_path / out)
            assert message in str(raised.value), str(raised.value)
            assert not (tmp_path / out).is_dir()

        return call

    def test_missing_folder(self, bad, tmp_path):
        bad(DataError, f"{tmp_path / 'nowhere'} does not exist", data=str(tmp_path / "nowhere"))

    def test_empty_class(self, bad, tmp_path):
        root = class_folders(tmp_path / "set", {"flower": 3, "temple": 3})
        (root / "nothing").mkdir()
        bad(DataError, "the class folders ['nothing'] hold no pictures", data=str(root))

    def test_one_class(self, bad, tmp_path):
        bad(DataError, "has one class, ['flower']", data=str(class_folders(tmp_path / "set", {"flower": 4})))

    def test_missing_weights(self, bad, tmp_path):
        bad(WeightsError, "there is no file", weights=str(tmp_path / "none.safetensors"))

    def test_unfinished_run_as_weights(self, bad, tmp_path):
        (tmp_path / "unfinished").mkdir()
        bad(RunError, "did the run finish?", weights=str(tmp_path / "unfinished"))

    def test_truncated_weights(self, bad, start, tmp_path):
        path = tmp_path / "short.safetensors"
        path.write_bytes(start["plain"].read_bytes()[:-100])
        bad(WeightsError, "short.safetensors is truncated", weights=str(path))

    def test_unknown_network(self, bad):
        bad(SpecError, "resnet51", arch="resnet51", weights="", freeze="none")

    def test_weights_of_another_network(self, bad):
        bad(WeightsError, "is for another network", arch="resnet50")

    def test_unknown_freezing_point(self, bad):
        bad(SpecError, "cannot freeze until 'layer9'; known: none, stem, layer1, layer2, trunk", freeze="layer9")

    def test_folder_that_cannot_be_made(self, bad, tmp_path):
        (tmp_path / "file").write_text("in the way")
        bad(RunError, "cannot make the folder", out="file/run")


def test_too_few_pictures_to_choose_a_head(start, tmp_path):
    root = class_folders(tmp_path / "set", {"flower": 6, "temple": 3})
    made = recipe("probe", data=str(root), weights=str(start["plain"]))
    with pytest.raises(DataError, match=r"class 'temple' has 2 pictures .* take --head linear"):
        fit(made, tmp_path / "run")
    fit(replace(made, head="linear"), tmp_path / "linear")


def test_an_unreadable_picture_stops_a_run(start, tmp_path):
    root = class_folders(tmp_path / "set", {"flower": 4, "temple": 4})
    (root / "flower" / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"flower/broken\.jpg is not a picture"):
        fit(recipe("linear-probe", data=str(root), weights=str(start["plain"])), tmp_path / "run")


@pytest.mark.parametrize("name", ["probe", "finetune"])
@pytest.mark.parametrize("weights", ["plain", "folded"])
def test_an_unreadable_picture_is_left_out_where_asked(name, weights, start, tmp_path):
    settings = {"weights": str(start[weights]), "precision": "fp32", "epochs": 1, "batch_size": 4}
    root = class_folders(tmp_path / "set" / "train", {"flower": 6, "temple": 6})
    class_folders(tmp_path / "set" / "val", {"flower": 3, "temple": 3})
    wanted = fit(recipe(name, data=str(root.parent), **settings), tmp_path / "wanted")
    for broken in ("train/flower/broken.jpg", "val/temple/broken.jpg"):
        (root.parent / broken).write_bytes(b"no picture")
    recorder = Recorder()
    made = recipe(name, data=str(root.parent), unreadable="skip", **settings)
    found = fit(made, tmp_path / "run", reporter=recorder)
    told = [line for line in recorder.lines if "left out of the" in line]
    for broken in ("train/flower/broken.jpg", "val/temple/broken.jpg"):
        assert any(broken in line for line in told)
    assert found.scores.seen == wanted.scores.seen
    if name == "probe":
        assert same_files(found.folder / "model.safetensors", wanted.folder / "model.safetensors")


def test_a_folder_with_a_run_is_not_overwritten(linear, pictures, start):
    before = {path: path.read_bytes() for path in linear.iterdir()}
    with pytest.raises(RunError, match=r"holds a run already; choose another --out, or go on with --resume"):
        fit(recipe("linear-probe", data=str(pictures), weights=str(start["plain"])), linear)
    assert {path: path.read_bytes() for path in linear.iterdir()} == before


def test_resume_needs_a_run_of_this_recipe(linear, pictures, start, tmp_path):
    made = recipe("linear-probe", data=str(pictures), weights=str(start["plain"]))
    with pytest.raises(RunError, match=r"holds no run to resume \(recipe\.toml is missing\)"):
        fit(made, tmp_path / "nothing", resume=True)
    assert not (tmp_path / "nothing").exists()
    with pytest.raises(RunError, match="was started with another recipe"):
        fit(replace(made, seed=7), linear, resume=True)


class Stops(Reporter):
    """Presses Ctrl-C when a task of that name has done so many pictures."""

    def __init__(self, task: str, done: int) -> None:
        self.task, self.done = task, done

    def progress(self, task, done, total, facts=None):
        if task.startswith(self.task) and done >= self.done:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("name", "stops"),
    [("linear-probe", ("features", 8)), ("finetune", ("features", 8)), ("finetune", ("train", 24))],
)
def test_a_stopped_run_goes_on_to_the_same_model(name, stops, pictures, start, tmp_path):
    settings = {"data": str(pictures), "weights": str(start["folded"]), "val_fraction": 0.3}
    made = recipe(name, **(settings | QUICK | {"epochs": 3, "augment": Augment(vflip=True)}))
    wanted = fit(made, tmp_path / "straight")
    for path in (tmp_path / "cache" / "features").iterdir():
        path.unlink()
    with pytest.raises(KeyboardInterrupt, match=f"go on with: isthmus train --resume {tmp_path / 'stopped'}"):
        fit(made, tmp_path / "stopped", reporter=Stops(*stops))
    with pytest.raises(
        RunError,
        match=r"has no model\.safetensors; (is it a run|the run is not finished)",
    ):
        predict(tmp_path / "stopped", pictures)
    found = fit(made, tmp_path / "stopped", resume=True)
    assert found.scores.to_dict() == wanted.scores.to_dict()
    assert same_files(found.folder / "model.safetensors", wanted.folder / "model.safetensors")


def test_a_lost_checkpoint_is_said(pictures, start, tmp_path):
    made = recipe("finetune", data=str(pictures), weights=str(start["plain"]), head="linear", **QUICK)
    wanted, recorder = fit(made, tmp_path / "run"), Recorder()
    before = copied(isthmus.load(wanted.folder))
    shutil.rmtree(wanted.folder / "checkpoints")
    (wanted.folder / "model.safetensors").unlink()  # or the run would be finished
    found = fit(made, tmp_path / "run", resume=True, reporter=recorder)
    assert any(line.endswith("holds no checkpoint; training begins anew") for line in recorder.lines)
    assert same(copied(isthmus.load(found.folder)), before)


def test_a_full_disk_while_saving_the_model(pictures, start, tmp_path, monkeypatch):
    def full(path, tensors, metadata):
        path.write_bytes(b"half a model")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setitem(WRITERS, ".safetensors", full)
    made = recipe("linear-probe", data=str(pictures), weights=str(start["plain"]))
    with pytest.raises(RunError, match=r"cannot write .*run/model\.safetensors: No space left on device"):
        fit(made, tmp_path / "run")
    assert left_over(tmp_path / "run") == [".lock", "environment.json", "log.jsonl", "recipe.toml"]
    monkeypatch.undo()
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    fit(made, tmp_path / "run", resume=True)
    assert set(left_over(tmp_path / "run")) == LEFT


def test_a_full_disk_while_training(pictures, start, tmp_path, monkeypatch):
    made = recipe("finetune", data=str(pictures), weights=str(start["plain"]), head="linear", **QUICK)
    wanted = fit(made, tmp_path / "straight")
    write, calls = torch.save, []

    def full(state, file):
        if isinstance(file, io.BufferedWriter) and "net" in state:
            calls.append(file.name)
        if len(calls) == 2:
            file.write(b"half a state")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(state, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RunError, match=r"cannot write .*run/checkpoints/step-\d+\.pt: No space left on device"):
        fit(made, tmp_path / "run")
    monkeypatch.setattr(torch, "save", write)
    assert len(left_over(tmp_path / "run" / "checkpoints")) == 1
    found = fit(made, tmp_path / "run", resume=True)
    assert same(copied(isthmus.load(found.folder)), copied(isthmus.load(wanted.folder)))


# --- evaluation


def test_other_data_is_measured_whole(linear, tmp_path):
    found = evaluate(linear, str(class_folders(tmp_path / "set", {"flower": 5, "temple": 3})), precision="fp32")
    assert found.classes == ("flower", "temple")
    assert found.confusion.sum(1).tolist() == [5, 3]


def test_labels_are_those_of_the_network(start, pictures, tmp_path):
    """Of three classes the other data has two, so that their places differ."""
    root = class_folders(tmp_path / "set", {"brick": 6, "flower": 6, "temple": 6})
    run = fit(recipe("linear-probe", data=str(root), weights=str(start["plain"])), tmp_path / "run")
    found = evaluate(run.folder, str(pictures), precision="fp32")
    assert found.classes == ("brick", "flower", "temple")
    assert found.confusion.sum(1).tolist() == [0, 10, 14]
    told = [row.classes[0] for row in predict(run.folder, pictures, precision="fp32")]
    assert found.confusion.sum(0).tolist() == [told.count(name) for name in found.classes]
    assert [row.support for row in found.per_class()] == [0, 10, 14]


def test_unknown_classes_are_named(linear, tmp_path):
    root = class_folders(tmp_path / "set", {"brick": 2, "flower": 2, "grass": 2})
    with pytest.raises(DataError, match=r"does not know the classes \['brick', 'grass'\]; it knows flower, temple"):
        evaluate(linear, str(root))


def test_a_weight_file_alone_needs_data(linear, pictures):
    with pytest.raises(RunError, match="does not say what it was trained on; name the pictures with --data"):
        evaluate(linear / "model.safetensors")
    assert evaluate(linear / "model.safetensors", str(pictures)).seen == 24


def test_missing_and_unfinished_runs(tmp_path, pictures):
    with pytest.raises(WeightsError, match=f"there is no file {tmp_path / 'none'}"):
        evaluate(tmp_path / "none")
    (tmp_path / "unfinished").mkdir()
    for use in (lambda: evaluate(tmp_path / "unfinished"), lambda: predict(tmp_path / "unfinished", pictures)):
        with pytest.raises(RunError, match=r"unfinished has no model\.safetensors"):
            use()


def test_names_of_the_package():
    assert (isthmus.fit, isthmus.evaluate, isthmus.predict) == (fit_and_report, evaluate, predict)
