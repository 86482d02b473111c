"""Reports of runs: what they say is what the run measured, they stand alone, and they never cost a run."""

import base64
import io
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import isthmus
from isthmus.arch.roofline import Bandwidth, Limits, roofline
from isthmus.data.sources import open_data
from isthmus.diagnose.findings import BlockSignals, Diagnosis, Spread
from isthmus.errors import RunError
from isthmus.evaluation.metrics import Tally, wilson
from isthmus.report.gather import gather
from isthmus.report.images import confusion_picture, heated, jpeg
from isthmus.report.write import write_report
from isthmus.run import evaluate, fit
from isthmus.train.recipe import Recipe
from isthmus.train.recipes import recipe
from made_up_runs import made_up_run
from report_pages import HOSTILE, PROBE, TUNED, Page
from small_runs import Recorder


def scores_of(run) -> Tally:
    return Tally.from_dict(json.loads((run / "evaluation.json").read_text()))


@pytest.mark.parametrize("name", [PROBE, TUNED])
def test_a_run_leaves_a_page_that_stands_alone(runs, name):
    page = Page(runs[name] / "report.html")
    page.check()
    scores = scores_of(runs[name])
    assert f"{scores.correct} of {scores.seen} validation pictures are right" in page.text
    low, high = wilson(scores.correct, scores.seen)
    assert f"{100 * low:.1f}–{100 * high:.1f} %" in page.text
    assert f"{100 * scores.calibration.expected_error:.1f} %" in page.text
    for title in ("Where it is wrong", "The most confident mistakes", "What ails the network", "What it costs"):
        assert title in page.text
    assert ("Heads compared" in page.text) == (name == PROBE)
    assert ("Learning rate" in page.text) == (name == TUNED)
    assert "Not in this report" not in page.text


@pytest.mark.parametrize("name", [PROBE, TUNED])
def test_every_plot_has_its_table(runs, name):
    page = Page(runs[name] / "report.html")
    assert page.text.count("As a table") == len(page.all("svg")) > 1


@pytest.mark.parametrize("name", [PROBE, TUNED])
def test_the_data_beside_the_page(runs, name):
    document = json.loads((runs[name] / "report.json").read_text())
    scores, net = scores_of(runs[name]), isthmus.load(runs[name])
    assert document["schema"] == 1
    assert document["scores"]["accuracy"]["value"] == scores.accuracy
    assert document["scores"]["balanced_accuracy"] == scores.balanced_accuracy
    assert {row["name"]: row["found"]["value"] for row in document["classes"]} == {
        row.name: row.recall for row in scores.per_class()
    }
    support = [row["found"]["value"] for row in document["classes"]]
    assert support == sorted(support)
    assert document["network"]["params"] == sum(each.numel() for each in net.parameters())
    assert sum(row["params"] for row in document["network"]["rows"]) == document["network"]["params"]
    assert sum(row["macs"] for row in document["network"]["rows"]) == document["network"]["macs"]
    assert document["diagnosis"]["pictures"] > 0
    assert document["missing"] == []
    confusion = scores.confusion.fill_diagonal_(0)
    assert sum(row["pictures"] for row in document["confused"]) == int(confusion.sum())
    settings = document["recipe"]["settings"]
    assert settings["freeze"] == ("trunk" if name == PROBE else "none")
    assert ("lr" in settings) == (name == TUNED)  # a probe has no use for it
    assert {"data", "weights"} <= set(document["recipe"]["changed"])


@pytest.mark.parametrize("name", [PROBE, TUNED])
def test_mistakes_are_those_of_the_run(runs, mixed, name):
    """Every one by name: the picture lies under one class, and the model that was saved sees another in it."""
    mistakes = json.loads((runs[name] / "report.json").read_text())["mistakes"]
    assert mistakes
    made = recipe("probe", data=str(mixed), weights="x", val_fraction=0.4)
    val = open_data(made.data, val_fraction=made.val_fraction, seed=made.seed).val
    told = {row.path: row for row in isthmus.predict(runs[name], *[row["name"] for row in mistakes], precision="fp32")}
    for row, prediction in zip(mistakes, told.values(), strict=True):
        assert val.name(row["index"]) == row["name"]
        assert prediction.classes[0] == row["predicted"] != row["label"]
        assert prediction.probabilities[0] == pytest.approx(row["confidence"], abs=1e-3)
        assert val.classes[val.labels[row["index"]]] == row["label"]
    sure = [row["confidence"] for row in mistakes]
    assert sure == sorted(sure, reverse=True)
    again = evaluate(runs[name], precision="fp32")
    assert [row.index for row in again.mistakes] == [row["index"] for row in mistakes]


def decoded(address: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))


def test_mistakes_are_shown_with_what_speaks_for_the_class(runs):
    page = Page(runs[TUNED] / "report.html")
    mistakes = json.loads((runs[TUNED] / "report.json").read_text())["mistakes"]
    images = page.all("img")
    shown = [each for each in images if "taken for" in each["alt"]]
    glowing = [each for each in images if "speaks for" in each["alt"]]
    assert len(shown) == len(mistakes)
    assert 0 < len(glowing) <= len(shown)
    with decoded(shown[0]["src"]) as image:
        assert (image.format, image.size) == ("JPEG", (32, 32))


def test_heat_maps_are_of_the_class_that_was_said(runs, tmp_path, monkeypatch):
    """By its place, for classes may share a name."""
    asked = []
    monkeypatch.setattr("isthmus.report.write.heat_maps", lambda _, x, classes: asked.extend(classes) or x[:, 0] * 0)
    out = tmp_path / "report.html"
    write_report(runs[TUNED], out)
    mistakes = json.loads(out.with_suffix(".json").read_text())["mistakes"]
    classes = isthmus.load(runs[TUNED]).classes
    assert [classes[place] for place in asked] == [row["predicted"] for row in mistakes]
    assert [[classes[place] for place in row["places"]] for row in mistakes] == [
        [row["label"], row["predicted"]] for row in mistakes
    ]


def test_names_are_text(runs):
    for name in (PROBE, TUNED):
        page = Page(runs[name] / "report.html")
        assert HOSTILE.partition("<")[2].partition("(")[0] not in [tag for tag, _ in page.tags]
        assert "<script" not in page.source
        assert "&lt;script&gt;alert(1)" in page.source
        assert "$x$" in page.text


def test_unreadable_validation_pictures_shift_no_name(mixed, runs, tmp_path):
    """Features are those of the readable pictures; the places of mistakes are those among all."""
    root = tmp_path / "pictures"
    shutil.copytree(mixed, root)
    settings = {"data": str(root), "weights": str(runs[PROBE]), "precision": "fp32", "val_fraction": 0.4}
    made = recipe("linear-probe", unreadable="skip", **settings)
    val = open_data(made.data, val_fraction=made.val_fraction, seed=made.seed).val
    for index in (0, 2):
        Path(val.name(index)).write_bytes(b"no picture")
    run = fit(made, tmp_path / "run", report=False)
    assert run.scores.seen == len(val) - 2
    assert run.scores.mistakes
    for row in run.scores.mistakes:
        assert row.name == val.name(row.index)
        assert row.label == val.classes[val.labels[row.index]]
    assert [row.index for row in evaluate(run.folder, precision="fp32").mistakes] == [
        row.index for row in run.scores.mistakes
    ]


# --- what is not there is said


@pytest.fixture
def old(runs, tmp_path):
    """A run folder as it was before confidences were counted."""
    folder = tmp_path / "old"
    shutil.copytree(runs[TUNED], folder, ignore=shutil.ignore_patterns("report.*", "checkpoints", "tensorboard"))
    written = json.loads((folder / "evaluation.json").read_text())
    for name in ("calibration", "mistakes"):
        written.pop(name, None)
    (folder / "evaluation.json").write_text(json.dumps(written))
    return folder


def test_old_runs_have_reports(old):
    page = Page(write_report(old))
    page.check()
    assert "scored before confidences were counted" in page.text
    assert "Not in this report" in page.text
    assert "Reliability" not in page.text
    assert "The most confident mistakes" not in page.text


def test_a_folder_without_log_recipe_and_machine(old):
    for name in ("log.jsonl", "recipe.toml", "environment.json"):
        (old / name).unlink()
    page = Page(write_report(old))
    page.check()
    for line in ("no curves", "no recipe", "no machine and versions"):
        assert line in page.text


def test_pictures_that_are_gone(runs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(runs[TUNED], folder)
    text = (folder / "recipe.toml").read_text()
    gone = tmp_path / "gone"
    (folder / "recipe.toml").write_text(re.sub(r'data = ".*"', f'data = "{gone}"', text))
    page = Page(write_report(folder))
    page.check()
    assert f"the pictures of mistakes: {gone} does not exist" in page.text
    assert "sure of" in page.text  # the mistakes are named all the same
    assert not page.all("img")


def test_pictures_that_are_others_now(runs, mixed, tmp_path):
    val = open_data(str(mixed), val_fraction=0.4).val
    turned = val.subset(list(range(len(val)))[::-1])
    page = Page(write_report(runs[TUNED], tmp_path / "page.html", val=turned))
    assert "others are in their places" in page.text
    assert not [each for each in page.all("img") if "taken for" in each["alt"]]


NONE = Spread(mean=math.nan, deviation=math.nan)
SPOILT = Diagnosis(
    findings=(),
    blocks=(BlockSignals(name="layer1.0", weight=1.0, scale=1.0, gradient=NONE),),
    strips=(),
    norms=(),
    checked=("gradients and updates",),
    unchecked=(),
    pictures=16,
)


def test_figures_that_are_no_numbers(runs, tmp_path):
    """Of a rate far too high: a word in the page, null in its data, which any reader of JSON takes."""
    folder = tmp_path / "run"
    shutil.copytree(runs[TUNED], folder)
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    rows[-1]["val_loss"] = None  # as the log has it
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = write_report(folder, diagnose=lambda: SPOILT)
    page = Page(path)
    page.check()
    assert "no number" in page.text
    document = json.loads(path.with_suffix(".json").read_text(), parse_constant=pytest.fail)
    assert document["diagnosis"]["blocks"][0]["gradient"] == {"mean": None, "deviation": None}


def fails(*_arguments, **_options):
    raise torch.OutOfMemoryError("no memory is left on the GPU")


def test_a_diagnosis_that_fails_costs_itself_alone(runs, tmp_path):
    page = Page(write_report(runs[TUNED], tmp_path / "page.html", diagnose=fails))
    page.check()
    assert "the diagnosis: OutOfMemoryError: no memory is left on the GPU" in page.text
    assert "Reliability" in page.text
    assert [each for each in page.all("img") if "taken for" in each["alt"]]


def test_heat_maps_that_fail_cost_pictures_alone(runs, tmp_path, monkeypatch):
    monkeypatch.setattr("isthmus.report.write.heat_maps", fails)
    page = Page(write_report(runs[TUNED], tmp_path / "page.html"))
    page.check()
    assert "the pictures of mistakes: OutOfMemoryError: no memory is left on the GPU" in page.text
    assert "sure of" in page.text


def test_no_mistakes(runs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(runs[PROBE], folder)
    right = Tally(("a", "b"))
    right.add(torch.eye(2), torch.tensor([0, 1]), torch.arange(2))
    (folder / "evaluation.json").write_text(json.dumps(right.to_dict()))
    page = Page(write_report(folder))
    page.check()
    assert "No validation picture is wrong." in page.text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: root / "none", "is no folder; name a run folder"),
        (lambda root: root, "holds no finished run"),
    ],
)
def test_what_is_no_run(tmp_path, make, message):
    with pytest.raises(RunError, match=message):
        write_report(make(tmp_path))


def test_names_of_pages(runs, tmp_path):
    with pytest.raises(RunError, match=r"must end in \.html"):
        write_report(runs[PROBE], tmp_path / "report.pdf")
    with pytest.raises(RunError, match=r"written as .*evaluation\.json"):
        write_report(runs[PROBE], runs[PROBE] / "evaluation.html")
    with pytest.raises(RunError, match=r"cannot write .*nowhere"):
        write_report(runs[PROBE], tmp_path / "nowhere" / "report.html")


# --- a report never costs a run


@pytest.mark.parametrize("error", [ValueError("a bug"), RunError("cannot write it: full"), MemoryError()])
def test_a_failing_report_leaves_the_run_whole(runs, mixed, tmp_path, monkeypatch, error):
    def fails(*_arguments, **_options):
        raise error

    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("isthmus.report.write.run_page", fails)
    made = recipe("linear-probe", data=str(mixed), weights=str(runs[PROBE]))
    recorder = Recorder()
    run = fit(made, tmp_path / "run", reporter=recorder)
    assert run.scores.seen > 0
    assert isthmus.load(run.folder).classes == run.scores.classes
    assert not (run.folder / "report.html").exists()
    (told,) = [line for line in recorder.lines if "report" in line]
    assert told.startswith("the run is whole, but not its report: ")
    assert str(error) in told
    assert told.endswith(f"isthmus report {run.folder}")
    monkeypatch.undo()
    Page(write_report(run.folder)).check()


def test_a_run_without_a_report(runs, mixed, tmp_path, monkeypatch):
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    run = fit(recipe("linear-probe", data=str(mixed), weights=str(runs[PROBE])), tmp_path / "run", report=False)
    assert not list(run.folder.glob("report*"))


def test_a_run_that_was_stopped_before_its_report_gets_it_on_resume(runs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(runs[TUNED], folder, ignore=shutil.ignore_patterns("report.*", "checkpoints", "tensorboard"))
    made, recorder = Recipe.from_file(folder / "recipe.toml"), Recorder()
    fit(made, folder, resume=True, report=False)
    assert not (folder / "report.html").exists()
    fit(made, folder, resume=True, reporter=recorder)
    assert recorder.lines[-1] == f"report: {folder / 'report.html'}"
    page = Page(folder / "report.html")
    page.check()
    assert "Not in this report" not in page.text
    fit(made, folder, resume=True, reporter=recorder)
    assert len(recorder.lines) == 3  # what is there stays


# --- many classes


@pytest.fixture(scope="module")
def large(tmp_path_factory, photos):
    folder = tmp_path_factory.mktemp("large") / "run"
    data = made_up_run(folder, photos[:4])
    return write_report(folder, val=data.val)


def test_a_thousand_classes_stay_small(large):
    """50,000 pictures: no million of cells, at most 5 MB."""
    assert large.stat().st_size <= 5_000_000
    page = Page(large)
    page.check()
    assert "The 15 classes that are found least" in page.text
    assert "Most often taken for each other" in page.text
    assert len(page.tags) < 10_000
    (confusion,) = [each for each in page.all("img") if each["alt"].startswith("Confusion matrix of 1000 classes")]
    with decoded(confusion["src"]) as image:
        assert (image.format, image.size) == ("PNG", (500, 500))


def test_the_picture_of_a_confusion():
    table = np.array([[8, 2, 0], [0, 0, 0], [1, 0, 99]])
    with decoded(confusion_picture(table)) as image:
        found = np.asarray(image.convert("RGBA")).astype(int)
    alpha = found[..., 3]
    assert ((alpha > 0) == (table > 0)).all()
    assert alpha[0, 0] > alpha[0, 1]  # 8 and 2 of 10
    assert alpha[2, 0] < alpha[0, 1] < alpha[2, 2]
    blue, orange = found[0, 0, :3], found[0, 1, :3]
    assert blue[2] > blue[0]
    assert orange[0] > orange[2]


def test_more_classes_than_points_are_added_up():
    table = np.zeros((1200, 1200), np.int64)
    table[7, 1100] = 5
    with decoded(confusion_picture(table)) as image:
        assert image.size == (400, 400)
        assert np.argwhere(np.asarray(image.convert("RGBA"))[..., 3]).tolist() == [[2, 366]]


# --- pictures


def test_pictures_are_small_jpegs():
    for channels in (1, 3):
        pixels = np.random.default_rng(0).integers(0, 255, (300, 400, channels), np.uint8)
        with decoded(jpeg(pixels)) as image:
            assert (image.format, image.size, image.mode) == ("JPEG", (224, 168), "L" if channels == 1 else "RGB")


def test_heat_glows_where_it_is():
    pixels = np.full((20, 20, 3), 60, np.uint8)
    heat = np.zeros((20, 20), np.float32)
    heat[:10] = 1
    found = heated(pixels, heat).astype(int)
    assert (found[10:] == 60).all()
    assert (found[:10].sum(2) > 300).all()


def test_times_on_a_machine_whose_limits_are_known(runs, tmp_path, monkeypatch):
    out = tmp_path / "report.html"
    desk = Limits(machine="desk", threads=1, lanes=8, fp32=1e11, bandwidth=(Bandwidth(size=2**20, rate=1e10),))
    for limits in (None, desk):
        monkeypatch.setattr("isthmus.report.gather.kept_limits", lambda limits=limits: limits)
        page, found = Page(write_report(runs[TUNED], out)), json.loads(out.with_suffix(".json").read_text())["floors"]
        page.check()
        assert ("once its limits are measured: isthmus bench machine" in page.text) == (limits is None) == (not found)
    net = isthmus.load(runs[TUNED])
    layers = roofline(isthmus.plan(net.spec, net.preprocess.crop), desk)
    floor, expected = (sum(getattr(each, key) for each in layers) for key in ("seconds", "expected"))
    assert (found["seconds"], found["expected"]) == (pytest.approx(floor), pytest.approx(expected))
    assert [row["name"] for row in found["rows"]] == ["stem", *net.stages, "head"]
    assert f"{1e3 * floor:.2f} ms for one picture in fp32 on 1 thread of desk" in page.text
    assert f"expect {1e3 * expected:.2f} ms of an engine" in page.text


def test_gathering_needs_no_pictures(runs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(runs[PROBE], folder)
    document = gather(folder).document
    assert document["run"] == str(folder)
    assert [row["taps"] for row in document["log"]["heads"]]
    assert document["network"]["head"] == document["log"]["heads"][0]["taps"]
    assert replace(gather(folder), images={}).images == {}
