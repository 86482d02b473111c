"""Predictions: of a few pictures and of many, told in rows that are right, complete, and there after any end."""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from filelock import FileLock
from PIL import Image

import isthmus
from broken_pictures import broken
from isthmus import ship
from isthmus.data import loader
from isthmus.data.decode import decode
from isthmus.data.transform import centred, evaluation_transform, normalise
from isthmus.deploy import predict as pipeline
from isthmus.deploy import predictor
from isthmus.deploy import quantize as int8
from isthmus.deploy.quantize import Limits
from isthmus.errors import DataError, EngineError, RecipeError, RunError, SpecError
from isthmus.ship import predict, predict_table, quantize
from small_runs import SPEC, Recorder, network, weights

pytestmark = pytest.mark.usefixtures("exported_once")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def small_parts(monkeypatch) -> None:
    """Parts of one batch of four."""
    monkeypatch.setattr(ship, "PART", 4)


def read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)


@pytest.fixture
def gallery(tmp_path, pictures) -> Path:
    """Pictures of every sound kind, and files that only look like pictures."""
    folder = tmp_path / "gallery"
    (folder / "inner").mkdir(parents=True)
    with Image.open(pictures / "flower" / "1.png") as flower:
        flower.load()
    flower.convert("CMYK").save(folder / "cmyk.jpg")
    deep = np.asarray(flower.convert("L")).astype(np.uint16) * 257
    Image.fromarray(deep).save(folder / "deep.png")
    flower.convert("P").save(folder / "palette.png")
    flower.convert("RGBA").save(folder / "transparent.png")
    flower.save(folder / "animated.gif", save_all=True, append_images=[flower.rotate(90)])
    flower.save(folder / "inner" / "plain.png")
    (folder / "bad_empty.jpg").touch()
    (folder / "bad_text.jpg").write_text("this is no picture")
    whole = (pictures / "temple" / "0.jpg").read_bytes()
    (folder / "bad_truncated.jpg").write_bytes(whole[: len(whole) // 2])
    return folder


def test_unreadable_pictures_are_told_and_the_rest_goes_on(linear, gallery):
    recorder = Recorder()
    rows = {row.path.name: row for row in predict(linear, gallery, batch_size=2, precision="fp32", reporter=recorder)}
    bad = {name for name, row in rows.items() if row.error}
    assert bad == {"bad_empty.jpg", "bad_text.jpg", "bad_truncated.jpg"}
    for name, row in rows.items():
        if name in bad:
            assert name in row.error
            assert (row.classes, row.probabilities) == ((), ())
        else:
            assert set(row.classes) == {"flower", "temple"}
            assert sum(row.probabilities) == pytest.approx(1, abs=1e-5)
            assert row.probabilities[0] >= row.probabilities[1]
    assert rows["palette.png"].classes == rows["plain.png"].classes
    assert recorder.steps[-1] == ("predicting", 9, 9)


def test_pictures_are_resized_exactly_where_precision_shows_it(linear, gallery, monkeypatch):
    asked = []

    def spy(pixels: object, record: object, *, exact: bool) -> object:
        asked.append(exact)
        return centred(pixels, record, exact=exact)

    monkeypatch.setattr(loader, "centred", spy)
    for precision, exact in (("fp32", True), ("bf16", False)):
        asked.clear()
        predict(linear, gallery, precision=precision)
        assert set(asked) == {exact}


def test_rows_come_in_the_order_asked_for(linear, pictures, gallery):
    first, second = pictures / "temple" / "3.png", pictures / "flower" / "0.jpg"
    rows = predict(linear, first, gallery / "bad_text.jpg", second, gallery / "inner", first)
    assert [row.path for row in rows] == [first, gallery / "bad_text.jpg", second, gallery / "inner" / "plain.png"]


def test_probabilities_are_those_of_the_network(linear, pictures):
    path = pictures / "flower" / "2.jpg"
    net = isthmus.load(linear)
    with torch.no_grad():
        image = normalise(evaluation_transform(net.preprocess)(decode(path))[None], net.preprocess)
        wanted = dict(zip(net.classes, net(image).softmax(1)[0].tolist(), strict=True))
    (row,) = predict(linear, path, precision="fp32")
    assert dict(zip(row.classes, row.probabilities, strict=True)) == pytest.approx(wanted, abs=1e-5)
    (first,) = predict(linear, path, top=1, precision="fp32")
    assert (first.classes, first.probabilities) == (row.classes[:1], row.probabilities[:1])


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_the_table_has_the_rows_of_the_list(linear, gallery, tmp_path, suffix, small_parts):
    out = tmp_path / f"table{suffix}"
    rows = predict(linear, gallery, top=9, batch_size=4, precision="fp32")
    made = predict_table(linear, gallery, out=out, top=9, batch_size=4, precision="fp32")
    assert (made.pictures, made.unreadable) == (9, 3)
    assert sorted(made.reasons) == sorted(row.error for row in rows if row.error)
    assert {path.name for path in tmp_path.iterdir()} <= {"cache", "gallery", out.name}
    written = read(out)
    assert list(written) == ["path", "class_1", "probability_1", "class_2", "probability_2", "error"]
    for row, (_, line) in zip(rows, written.iterrows(), strict=True):
        assert line["path"] == str(row.path)
        if row.error:
            assert line["error"] == row.error
            assert line.drop(["path", "error"]).isna().all()
        else:
            assert (line["class_1"], line["class_2"]) == row.classes
            assert (line["probability_1"], line["probability_2"]) == pytest.approx(row.probabilities, abs=1e-6)
            assert pd.isna(line["error"])


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_all_probabilities_and_features_are_those_of_the_network(linear, gallery, tmp_path, suffix):
    """Beside torch itself, picture by picture."""
    net = isthmus.load(linear).eval()
    given = {"batch_size": 4, "precision": "fp32"}
    every, features = tmp_path / f"every{suffix}", tmp_path / f"features{suffix}"
    predict_table(linear, gallery, out=every, probabilities=True, **given)
    predict_table(linear, gallery, out=features, features="layer1", **given)
    seen, pooled = read(every), read(features)
    assert list(seen) == ["path", "probability_flower", "probability_temple", "error"]
    wide = pooled.drop(columns=["path", "error"])
    for place, path in enumerate(seen["path"]):
        if not pd.isna(seen["error"][place]):
            assert seen.iloc[place, 1:3].isna().all()
            assert wide.iloc[place].isna().all()
            continue
        image = evaluation_transform(net.preprocess)(decode(path))[None]
        with torch.no_grad():
            found = net(normalise(image, net.preprocess)).softmax(1)[0]
            maps = net.features(normalise(image, net.preprocess), ("layer1",))["layer1"].mean((2, 3))[0]
        assert seen.iloc[place, 1:3].tolist() == pytest.approx(found.tolist(), abs=1e-5)
        told = wide.iloc[place].tolist() if suffix == ".csv" else wide["features"][place].tolist()
        assert told == pytest.approx(maps.tolist(), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_engines_predict_what_torch_predicts(linear, gallery, tmp_path, engine):
    """Also in batches that are not full, and over several views."""
    net = isthmus.load(linear).eval()
    net.preprocess = replace(net.preprocess, views=("identity", "hflip"))
    file = tmp_path / "two_views.safetensors"
    isthmus.save_weights(net, file)
    wanted = predict(file, gallery, batch_size=4, precision="fp32", engine="torch")
    found = predict(file, gallery, batch_size=4, precision="fp32", engine=engine)
    for one, other in zip(wanted, found, strict=True):
        assert (one.path, one.classes, one.error) == (other.path, other.classes, other.error)
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-4)


def test_many_pictures_are_predicted_by_the_fastest_engine(linear, gallery, tmp_path, monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(pipeline, "FEW", 9)
    quick = {name: engine for name, engine in predictor.ENGINES.items() if name != "inductor"}
    monkeypatch.setattr(predictor, "ENGINES", quick)
    predict_table(linear, gallery, out=tmp_path / "table.csv", batch_size=4, reporter=recorder)
    assert any("pictures/s, 4 at once, for throughput, the fastest of" in line for line in recorder.lines)
    assert "the network" in recorder.lines[-1] or "reading" in recorder.lines[-1]


# --- jobs that are ended


def test_what_is_done_is_not_done_again(linear, pictures, tmp_path, small_parts, monkeypatch):
    whole, out = tmp_path / "whole.csv", tmp_path / "out.csv"
    given = {"batch_size": 4, "precision": "fp32"}
    predict_table(linear, pictures, out=whole, **given)
    read_again = []
    keep = pipeline.Answers

    def stopping(**values):
        if len(list((tmp_path / "out.csv.parts").glob("0*"))) == 3:
            raise KeyboardInterrupt
        return keep(**values)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "Answers", stopping)
        with pytest.raises(KeyboardInterrupt):
            predict_table(linear, pictures, out=out, **given)
    assert not out.exists()
    monkeypatch.setattr(pipeline, "Answers", lambda **values: read_again.extend(values["names"]) or keep(**values))
    recorder = Recorder()
    made = predict_table(linear, pictures, out=out, reporter=recorder, **given)
    assert "3 of 6 parts are done already" in recorder.lines
    assert read_again == pd.read_csv(whole)["path"].tolist()[12:]
    assert made.pictures == 24
    assert out.read_bytes() == whole.read_bytes()
    assert not (tmp_path / "out.csv.parts").exists()


KILLED = """
import sys
from isthmus import ship
from isthmus.ship import predict_table
ship.PART = 4
predict_table(*sys.argv[2:], out=sys.argv[1], batch_size=4)
"""


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.long)])
def test_a_job_that_is_killed_goes_on(linear, pictures, gallery, tmp_path, kills):
    """By SIGKILL, when a number of parts that nobody knows before are on the disk."""
    whole, out = tmp_path / "whole.csv", tmp_path / "out.csv"
    predict_table(linear, pictures, gallery, out=whole, batch_size=4)
    command = [sys.executable, "-c", KILLED, str(out), str(linear), str(pictures), str(gallery)]
    dice = random.Random(kills)

    def done() -> int:
        with suppress(FileNotFoundError):
            return sum(name.startswith("0") for name in os.listdir(tmp_path / "out.csv.parts"))  # noqa: PTH208
        return 0

    killed = 0
    for _ in range(kills):
        enough = dice.randrange(0, 4)
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            start = done()
            while process.poll() is None and done() < start + enough:
                pass
            process.send_signal(signal.SIGKILL)
        killed += process.returncode == -signal.SIGKILL
    assert killed
    subprocess.run(command, check=True)
    assert out.read_bytes() == whole.read_bytes()
    assert not (tmp_path / "out.csv.parts").exists()


PEAK = """
import resource, sys
from isthmus.ship import predict_table
predict_table(*sys.argv[2:], out=sys.argv[1])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.long
def test_memory_is_the_same_for_ten_times_the_pictures(linear, pictures, tmp_path):
    sources = sorted(pictures.rglob("*.jpg"))
    peaks = []
    for count in (5_000, 50_000):
        folder = tmp_path / str(count)
        folder.mkdir()
        for number in range(count):
            os.link(sources[number % len(sources)], folder / f"a rather long name of a picture file {number}.jpg")
        command = [sys.executable, "-c", PEAK, str(tmp_path / f"{count}.csv"), str(linear), str(folder)]
        told = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks.append(int(told.stdout))
        assert len(pd.read_csv(tmp_path / f"{count}.csv")) == count
    assert peaks[1] < 1.1 * peaks[0], peaks


def test_an_end_while_parts_are_removed(linear, pictures, tmp_path, small_parts):
    """What is left of them counts for nothing."""
    out, folder = tmp_path / "out.csv", tmp_path / "out.csv.parts"
    folder.mkdir()
    (folder / "00000001.csv").write_text("path,class_1\nother,rows\n")
    predict_table(linear, pictures, out=out, batch_size=4, top=1)
    assert pd.read_csv(out)["class_1"].isin(["flower", "temple"]).all()


def test_a_job_goes_on_with_its_engine_where_another_is_chosen_now(
    linear, pictures, tmp_path, small_parts, monkeypatch
):
    """Also where the precision alone is given, as it was; what is unreadable is counted now."""
    whole, out, given = tmp_path / "whole.csv", tmp_path / "out.csv", {"batch_size": 4, "precision": "fp32"}
    (tmp_path / "bad.jpg").write_text("no picture")
    places = [tmp_path / "bad.jpg", pictures]
    made = predict_table(linear, *places, out=whole, **given)
    assert (made.pictures, made.predicted, made.unreadable) == (25, 25, 1)
    with monkeypatch.context() as patch:
        patch.setattr("isthmus.deploy.job.Job.missing", lambda _: [0])
        with pytest.raises(RunError, match=r"cannot write .*out\.csv: No such file"):  # the other parts
            predict_table(linear, *places, out=out, **given)
    monkeypatch.setattr(pipeline, "FEW", 1)  # now all engines would be timed
    made = predict_table(linear, *places, out=out, **given)
    assert (made.pictures, made.predicted, made.unreadable) == (25, 21, 0)
    assert out.read_bytes() == whole.read_bytes()


def test_a_file_system_without_locks_is_told(linear, pictures, tmp_path, monkeypatch):
    def none(*_, **__):
        raise NotImplementedError

    monkeypatch.setattr(FileLock, "acquire", none)
    recorder = Recorder()
    made = predict_table(linear, pictures, out=tmp_path / "out.csv", reporter=recorder)
    assert made.pictures == 24
    assert recorder.lines[0] == f"the file system of {made.path} has no locks: let no other command write it"


def test_parts_of_another_job_are_not_mixed_in(linear, plain, pictures, tmp_path, monkeypatch):
    out = tmp_path / "out.csv"
    given = {"out": out, "batch_size": 4}

    def ended(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("isthmus.deploy.job.Job.finish", ended)
        with pytest.raises(KeyboardInterrupt):
            predict_table(linear, pictures, **given)
    with pytest.raises(RunError, match=r"out\.csv\.parts holds parts of another job \(told differ\); .* remove"):
        predict_table(linear, pictures, top=1, **given)
    with pytest.raises(RunError, match=r"another job .*network"):
        predict_table(plain, pictures, **given)
    with pytest.raises(RunError, match=r"another job .*pictures"):
        predict_table(linear, pictures / "flower", **given)
    with (
        FileLock(tmp_path / "out.csv.parts/.lock"),
        pytest.raises(RunError, match=r"another command writes .*out\.csv"),
    ):
        predict_table(linear, pictures, **given)
    predict_table(linear, pictures, **given)
    assert len(pd.read_csv(out)) == 24


@pytest.mark.parametrize("count", [30, pytest.param(1980, marks=pytest.mark.long)])
def test_every_kind_of_broken_picture_is_told(linear, pictures, tmp_path, small_parts, count):
    """Twenty of them, all over so many sound ones."""
    sources, folder = sorted(pictures.rglob("*.*g")), tmp_path / "all"
    files = broken(folder)
    assert len(files) == 20
    for number in range(count):
        os.link(sources[number % len(sources)], folder / f"broken_{number % 20:02d}_{number}.jpg")  # in between
    out = tmp_path / "out.parquet"
    made = predict_table(linear, folder, out=out, batch_size=4, precision="fp32")
    assert (made.pictures, made.unreadable, len(made.reasons)) == (count + 20, 20, 20)
    rows = pd.read_parquet(out).set_index("path")
    for kind, path in files.items():
        assert str(path) in rows["error"][str(path)], kind
        assert rows["class_1"].isna()[str(path)]
    good = rows[rows["error"].isna()]
    assert len(good) == count
    alone = {str(row.path): row.classes[0] for row in predict(linear, pictures, batch_size=4, precision="fp32")}
    for path, found in good["class_1"].items():
        number = int(Path(path).stem.rpartition("_")[2])
        assert found == alone[str(sources[number % len(sources)])]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_names_that_are_no_text_have_their_bytes(linear, pictures, tmp_path, suffix):
    folder, out = tmp_path / "odd", tmp_path / f"out{suffix}"
    folder.mkdir()
    shutil.copy(pictures / "flower" / "1.png", folder / os.fsdecode(b"caf\xe9.png"))
    (folder / os.fsdecode(b"\xff.jpg")).write_text("no picture")
    predict_table(linear, folder, out=out, precision="fp32")
    rows = read(out)
    assert rows["path"].tolist() == [rf"{folder}/caf\xe9.png", rf"{folder}/\xff.jpg"]
    assert rows["error"][1].startswith(rf"{folder}/\xff.jpg is not a picture")


def test_classes_that_share_a_name_are_told_apart(pictures, tmp_path, small_parts):
    """As two of ImageNet do; a name may also have two lines."""
    net = network()
    net.classes = ("crane", "two\nlines", "a", "b", "crane", "c", "d")
    file, told = (
        weights(tmp_path / "net.safetensors", net),
        ["crane (0)", "two\nlines", "a", "b", "crane (4)", "c", "d"],
    )
    (row,) = predict(file, pictures / "flower" / "0.jpg", top=7, precision="fp32")
    assert sorted(row.classes) == sorted(told)
    assert sum(row.probabilities) == pytest.approx(1, abs=1e-5)
    probabilities = [dict(zip(row.classes, row.probabilities, strict=True))[name] for name in told]
    for suffix in (".csv", ".parquet"):
        out = tmp_path / f"out{suffix}"
        predict_table(file, pictures, out=out, probabilities=True, batch_size=4, precision="fp32")
        rows = read(out)
        assert list(rows) == ["path", *(f"probability_{name}" for name in told), "error"]
        assert len(rows) == 24
        assert rows.iloc[0, 1:8].tolist() == pytest.approx(probabilities, abs=1e-5)


def test_none_that_can_be_read_is_still_a_table(linear, tmp_path):
    broken(tmp_path / "broken")
    made = predict_table(linear, tmp_path / "broken", out=tmp_path / "out.csv", top=1)
    assert (made.pictures, made.unreadable) == (20, 20)
    rows = pd.read_csv(tmp_path / "out.csv")
    assert rows["class_1"].isna().all()
    assert rows["error"].notna().all()


# --- in 8 bits


LOOSE = Limits(max_drop=1.0, min_agreement=0.0)


def test_int8_is_made_once_for_the_same_pictures(linear, pictures, tmp_path, monkeypatch):
    some = shutil.copytree(pictures, tmp_path / "pictures")
    made = quantize(linear, pictures=[some], limits=LOOSE)
    with monkeypatch.context() as patch:
        patch.setattr(int8, "calibrated", None)
        recorder = Recorder()
        again = quantize(linear, pictures=[some], limits=LOOSE, reporter=recorder)
        assert (again.onnx, again.judged, again.higher) == (made.onnx, made.judged, made.higher)
        assert recorder.lines[-1].endswith("as made before")
        with pytest.raises(TypeError, match="not callable"):  # made anew
            quantize(linear, pictures=[some], limits=LOOSE, engine="onnxruntime")
        shutil.copy(some / "temple" / "1.png", some / "flower" / "1.png")
        with pytest.raises(TypeError, match="not callable"):
            quantize(linear, pictures=[some], limits=LOOSE)


def test_predictions_in_int8_without_a_run(linear, pictures, tmp_path, monkeypatch):
    """Calibrated on some of the pictures that are predicted, measured on others."""
    monkeypatch.setattr(ship, "Limits", lambda: LOOSE)
    monkeypatch.setattr(predictor, "rates", lambda calls, _: {key: 2.0 if "int8" in key else 1.0 for key in calls})
    recorder, file = Recorder(), linear / "model.safetensors"
    wanted = predict(file, pictures, precision="fp32")
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes(file.read_bytes())
    found = predict(alone, pictures, precision="int8", reporter=recorder)
    assert recorder.lines[0] == "int8: calibrating on 12 pictures, measuring on 12"
    assert [row.path for row in found] == [row.path for row in wanted]
    first = [dict(zip(row.classes, row.probabilities, strict=True))["flower"] for row in wanted]
    second = [dict(zip(row.classes, row.probabilities, strict=True))["flower"] for row in found]
    assert first != second
    assert np.median(np.abs(np.subtract(first, second))) < 0.02


def test_bad_requests_for_predictions(linear, pictures, gallery, tmp_path):
    with pytest.raises(DataError, match=r"nothing\.jpg does not exist"):
        predict(linear, tmp_path / "nothing.jpg")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no pictures"):
        predict(linear, tmp_path / "empty")
    with pytest.raises(DataError, match=r"none of 1 pictures can be read.*bad_text\.jpg"):
        predict(linear, gallery / "bad_text.jpg")
    with pytest.raises(RecipeError, match="top is 0"):
        predict(linear, pictures, top=0)
    with pytest.raises(RecipeError, match="batch size is 0"):
        predict(linear, pictures, batch_size=0)
    with pytest.raises(RunError, match=r"there is no folder .*/none"):
        predict_table(linear, pictures, out=tmp_path / "none" / "out.csv")
    with pytest.raises(SpecError, match=r"out\.txt has no suffix that says what to write; known: \.csv, \.parquet"):
        predict_table(linear, pictures, out=tmp_path / "out.txt")
    with pytest.raises(RecipeError, match="no stage 'layer9' to take features of; known: layer1, layer2"):
        predict_table(linear, pictures, out=tmp_path / "out.csv", features="layer9")
    with pytest.raises(RecipeError, match="int8 is measured by the classes"):
        predict_table(linear, pictures, out=tmp_path / "out.csv", features="layer1", precision="int8")
    with pytest.raises(RecipeError, match="are two tables"):
        predict_table(linear, pictures, out=tmp_path / "out.csv", features="layer1", probabilities=True)
    for wrong in ({"workers": 2}, {"workers": -1, "cluster": "local"}):
        with pytest.raises(RecipeError, match=r"workers is -?[12]; give 1 or more to a cluster"):
            predict_table(linear, pictures, out=tmp_path / "out.csv", **wrong)
    with pytest.raises(EngineError, match="fp16 is for GPUs"):
        predict(linear, pictures, engine="openvino", precision="fp16")
    with pytest.raises(RecipeError, match="device 'tpu' is not available here"):
        predict(linear, pictures, device="tpu")
    assert not list(tmp_path.glob("*.parts"))
    headless = weights(tmp_path / "headless.safetensors", network(replace(SPEC, num_classes=0)))
    with pytest.raises(RecipeError, match="has no classifier"):
        predict(headless, pictures)


def test_classes_without_names_are_numbered(plain, pictures):
    (row,) = predict(plain, pictures / "flower" / "0.jpg", top=3)
    assert len(row.classes) == 3
    assert set(row.classes) <= {f"class {number}" for number in range(7)}


def test_a_full_disk_while_writing_predictions(linear, pictures, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    out = tmp_path / "out.csv"
    out.write_text("older")
    with pytest.raises(RunError, match=r"cannot write .*job\.json: No space left on device; nothing was changed"):
        predict_table(linear, pictures, out=out)
    assert out.read_text() == "older"
