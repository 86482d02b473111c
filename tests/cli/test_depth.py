"""`isthmus depth`, as a person calls it."""

import json

import pytest

from small_runs import class_folders


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return str(class_folders(tmp_path_factory.mktemp("depth"), {"brick": 8, "grass": 8}))


def test_table(isthmus, pictures):
    result = isthmus(
        "depth", "resnet20_cifar", "--data", pictures, "--steps", "2", "--batch-size", "4", "--image-size", "16"
    )
    assert result.status == 0, result.err
    lines = result.out.splitlines()
    assert lines[0].rstrip() == "resnet20_cifar at 16 px, 4 pictures a step, lr 0.005, seed 0"
    rows = [line.strip().split("  ")[0] for line in lines]
    assert [row for row in rows if "norm" in row][:4] == [
        "shortcuts, batch norm",
        "plain, batch norm",
        "shortcuts, no norm",
        "plain, no norm",
    ]


def test_json_has_everything(isthmus, pictures):
    result = isthmus("depth", "plain20_cifar", "--data", pictures, "--steps", "0", "--batch-size", "4", "--json")
    assert result.status == 0, result.err
    found = json.loads(result.out)
    assert {name: value for name, value in found.items() if name != "twins"} == {
        "network": "plain20_cifar",
        "image_size": 32,
        "batch_size": 4,
        "lr": 0.005,
        "seed": 0,
    }
    assert [(twin["shortcuts"], twin["norm"]) for twin in found["twins"]] == [
        (True, "batch"),
        (False, "batch"),
        (True, "none"),
        (False, "none"),
    ]
    for twin in found["twins"]:
        assert len(twin["gradients"]) == 9
        assert list(twin["correlations"]) == ["1/16384", "1/4096", "1/1024", "1/256", "1/64", "1/16"]
        assert twin["losses"] == []
        assert twin["loss"] is None


def test_a_spec_of_ones_own_for_grey_pictures(isthmus, pictures, tmp_path):
    spec = tmp_path / "mine.toml"
    spec.write_text(
        "in_channels = 1\n[stem]\nwidths = [8]\nkernel = 3\n[[stages]]\ndepth = 2\nmid = 8\nout = 16\n",
        encoding="utf-8",
    )
    result = isthmus("depth", str(spec), "--data", pictures, "--steps", "1", "--batch-size", "4", "--json")
    assert result.status == 0, result.err
    assert json.loads(result.out)["image_size"] == 64


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["resnet5"], "there is no network named 'resnet5'"),
        (["resnet20_cifar", "--steps", "-1"], "steps must be 0 or more"),
        (["resnet20_cifar", "--batch-size", "1"], "batch size of 2 or more"),
    ],
)
def test_mistakes(isthmus, pictures, words, told):
    result = isthmus("depth", *words, "--data", pictures)
    assert result.status == 2
    assert told in result.err
