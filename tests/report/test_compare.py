"""Runs side by side."""

import json
import shutil
from pathlib import Path

import pytest

from isthmus.errors import RunError
from isthmus.report.compare import class_differences, differences, labels, verdict
from isthmus.report.write import write_comparison
from report_pages import PROBE, TUNED, Page


@pytest.fixture(scope="module")
def compared(runs, tmp_path_factory) -> Path:
    return write_comparison([runs[PROBE], runs[TUNED]], tmp_path_factory.mktemp("pages") / "compared.html")


def test_the_page_stands_alone(compared):
    page = Page(compared)
    page.check()
    for title in ("Scores and cost", "How they learned", "Where they differ", "What set them apart"):
        assert title in page.text
    assert f"{PROBE} · {TUNED}" in page.text
    assert "not validated on the same pictures" not in page.text


def test_the_data_beside_the_page(compared, runs):
    found = json.loads(compared.with_suffix(".json").read_text())
    scores = [json.loads((runs[name] / "evaluation.json").read_text()) for name in (PROBE, TUNED)]
    assert [row["name"] for row in found["runs"]] == [PROBE, TUNED]
    assert [row["accuracy"]["value"] for row in found["runs"]] == [each["accuracy"] for each in scores]
    assert [row["expected_error"] for row in found["runs"]] == [
        each["calibration"]["expected_error"] for each in scores
    ]
    assert found["same_pictures"] is True
    settings = {row["name"]: row["values"] for row in found["settings"]}
    assert settings["freeze"] == ["trunk", "none"]
    assert settings["lr"] == [None, 1e-3]
    assert "data" not in settings
    assert found["versions"] == found["machines"] == []
    recall = [{row["name"]: row["recall"] for row in each["per_class"]} for each in scores]
    for row in found["classes"]:
        assert row["found"] == [each[row["name"]] for each in recall]


def test_other_pictures_are_said(runs, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(runs[TUNED], other, ignore=shutil.ignore_patterns("checkpoints"))
    text = (other / "recipe.toml").read_text()
    (other / "recipe.toml").write_text(text.replace("seed = 0", "seed = 1"))
    page = Page(write_comparison([runs[TUNED], other], tmp_path / "page.html"))
    page.check()
    assert "not validated on the same pictures" in page.text
    assert "seed" in page.text


def test_a_run_is_compared_with_another(runs, tmp_path):
    with pytest.raises(RunError, match="a run is named twice"):
        write_comparison([runs[PROBE], runs[PROBE]], tmp_path / "page.html")


@pytest.mark.parametrize(
    ("folders", "wanted"),
    [
        (["runs/1", "runs/2"], ["1", "2"]),
        (["/a/b/run", "/a/c/run"], ["b/run", "c/run"]),
        (["runs", "runs/1"], ["runs", "runs/1"]),
        (["x", "y"], ["x", "y"]),
    ],
)
def test_runs_are_called_by_what_tells_them_apart(folders, wanted):
    assert labels(folders) == wanted


def test_settings_that_one_run_does_not_have():
    rows = differences([{"a": 1, "b": 2}, {"a": 1, "c": None}])
    assert rows == [{"name": "b", "values": [2, None]}]


def test_classes_that_differ_most_come_first():
    def run(**found: float) -> dict[str, object]:
        return {"classes": [{"name": name, "found": {"value": value}} for name, value in found.items()]}

    rows = class_differences([run(a=0.5, b=0.9, c=0.3), run(a=0.5, b=0.2)])
    assert [row["name"] for row in rows] == ["b", "a", "c"]
    assert rows[2]["found"] == [0.3, None]


@pytest.mark.parametrize(
    ("parts", "wanted"),
    [
        ({"a": 0.9, "b": 0.2}, "a is right most often: 90.0 % (80.0–95.0 %). Its interval overlaps with no other."),
        (
            {"a": 0.85, "b": 0.9},
            (
                "b is right most often: 90.0 % (80.0–95.0 %). Its interval overlaps with that of a, so these pictures "
                "alone do not settle it."
            ),
        ),
        ({"a": 0.9, "b": 0.9}, "a and b are right equally often: 90.0 % (80.0–95.0 %)."),
        (
            {"a": 0.9, "b": 0.1, "c": 0.9},
            "a and c are right equally often: 90.0 % (80.0–95.0 %). Their interval overlaps with no other.",
        ),
    ],
)
def test_which_run_is_best(parts, wanted):
    rows = [
        {"name": name, "accuracy": {"value": part, "low": part - 0.1, "high": part + 0.05}}
        for name, part in parts.items()
    ]
    found = verdict(rows, max(rows, key=lambda row: row["accuracy"]["value"]))
    assert found.replace("\N{NO-BREAK SPACE}", " ").replace("\N{WORD JOINER}", "") == wanted
