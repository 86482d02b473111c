"""The command report: what it writes and prints, and how it refuses."""

import json
from pathlib import Path

import pytest

from small_runs import class_folders, weights


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run without a report."""
    from isthmus.run import fit
    from isthmus.train.recipes import recipe

    folder = tmp_path_factory.mktemp("runs")
    pictures = class_folders(folder / "pictures", {"flower": 10, "temple": 14})
    start = weights(folder / "start.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ISTHMUS_CACHE", str(folder / "cache"))
        made = recipe("linear-probe", data=str(pictures), weights=str(start))
        fit(made, folder / "one", report=False)
        fit(made, folder / "two [b]", report=False)
    return folder / "one"


def test_one_run(isthmus, run):
    result = isthmus("report", str(run))
    assert result.status == 0
    assert result.out.startswith("accuracy ")
    assert "95 % interval" in result.out
    assert f"{run / 'report.html'}: " in result.out
    document = json.loads((run / "report.json").read_text())
    assert all(finding["found"] in result.out for finding in document["diagnosis"]["findings"])
    assert (run / "report.html").read_text().startswith("<!DOCTYPE html>")


def test_another_place_and_json(isthmus, run, tmp_path):
    page = tmp_path / "page.html"
    result = isthmus("report", str(run), "--out", str(page), "--json")
    assert result.status == 0
    assert json.loads(result.out) == json.loads(page.with_suffix(".json").read_text())
    assert page.is_file()


def test_several_runs(isthmus, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = isthmus("report", str(run), str(run.parent / "two [b]"))
    assert result.status == 0
    assert "two [b]" in result.out
    assert "comparison.html" in result.out
    found = json.loads(isthmus("report", str(run), str(run.parent / "two [b]"), "--json").out)
    assert [row["name"] for row in found["runs"]] == ["one", "two [b]"]
    assert found["settings"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "nowhere is no folder; name a run folder"),
        ((".",), "holds no finished run"),
        (("RUN", "--out", "page.pdf"), "must end in .html"),
        (("RUN", "RUN"), "a run is named twice"),
        (("RUN", "nowhere"), "nowhere is no folder"),
    ],
)
def test_refusals(isthmus, run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = isthmus("report", *(each.replace("RUN", str(run)) for each in arguments))
    assert (result.status, result.out) == (2, "")
    assert message in result.err
    assert list(tmp_path.iterdir()) == []
