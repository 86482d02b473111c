"""The commands of weight files: what they print, as tables and as JSON, their exit status, and how they refuse."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi

import isthmus as package
from isthmus import records
from isthmus.arch.preprocess import IMAGENET, Preprocess
from isthmus.arch.variants import variant
from isthmus.weights.load import load
from isthmus.weights.published.catalog import CATALOG
from isthmus.weights.save import save_weights
from oracles import random_state
from small_runs import SPEC, class_folders, copied, network, same


@pytest.fixture
def ours(tmp_path, monkeypatch):
    """A file of ours in the working folder, described in full."""
    monkeypatch.chdir(tmp_path)
    net = network()
    net.classes = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")
    save_weights(net, "a.safetensors", extra={"licence": "MIT"})
    return "a.safetensors"


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A state dict of ResNet-18 that does not say so."""
    monkeypatch.chdir(tmp_path)
    net = package.create(replace(variant("resnet18"), num_classes=5))
    net.load_state_dict(random_state(net))
    torch.save({"state_dict": net.state_dict()}, "bare.pth")
    return "bare.pth"


# -- inspect -----------------------------------------------------------------------------------------------------------


def test_inspect_prints_what_it_printed_before(isthmus, golden, ours, bare):
    with torch.no_grad():
        net = load(ours)
        net.bn1.running_var[0] = 0
        net.fc.bias.zero_()
    save_weights(net, "odd.safetensors")
    seen = [isthmus("weights", "inspect", *words) for words in ((ours,), (bare,), ("odd.safetensors", "--values"))]
    assert [(result.status, result.err) for result in seen] == [(0, "")] * 3
    golden("weights_inspect.txt", "\n".join(result.out for result in seen))


def test_what_the_commands_load(tmp_path):
    """The list is there before torch could be; a file's headers leave its compiler alone, which takes seconds."""
    net = package.create(replace(variant("resnet50_keras"), num_classes=5))
    save_weights(net, tmp_path / "a.h5", layout="keras")
    code = """if True:
        import sys
        from isthmus.cli.main import main
        for words, heavy in (["list"], {"torch", "huggingface_hub"}), (["inspect", "a.h5"], {"torch._dynamo"}):
            sys.argv = ["isthmus", "weights", *words]
            try:
                main()
            except SystemExit as end:
                assert not end.code, end.code
            assert not heavy & set(sys.modules), heavy & set(sys.modules)
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert "resnet50_keras" in result.stdout


def test_inspect_json(isthmus, ours):
    found = json.loads(isthmus("weights", "inspect", ours, "--json").out)
    assert list(found) == [
        "source", "format", "bytes", "layout", "evidence", "network", "candidates", "tensors", "parameters", "dtypes",
        "classes", "preprocess", "metadata", "notes", "findings", "values",
    ]  # fmt: skip
    assert (found["network"], found["layout"], found["format"]) == ("tiny", "native", "safetensors")
    assert records.from_dict(Preprocess, found["preprocess"]) == IMAGENET.at(32)
    assert (found["findings"], found["values"]) == ([], False)
    assert found["evidence"][0]["layout"] == "native"


def test_inspect_json_of_findings(isthmus, bare):
    tensors = torch.load(bare)["state_dict"]
    tensors["fc.bias"][0] = float("nan")
    torch.save(tensors, bare)
    found = json.loads(isthmus("weights", "inspect", bare, "--values", "--json").out)
    assert found["values"]
    assert found["preprocess"] is None
    (finding,) = found["findings"]
    assert (finding["kind"], finding["tensors"]) == ("not-finite", ["fc.bias"])


# -- convert -----------------------------------------------------------------------------------------------------------


def test_convert_prints_the_report_and_the_proof(isthmus, bare):
    result = isthmus("weights", "convert", bare, "out.safetensors", "--to", "mmpretrain", "--arch", "resnet18")
    assert (result.status, result.err) == (0, "")
    assert "bare.pth (native): 122 of 122 tensors as they are, 11,179,077 parameters loaded" in result.out
    assert "out.safetensors (mmpretrain), read back" in result.out
    assert "122 of 122 equal to the last bit" in result.out
    assert load("out.safetensors").spec == replace(variant("resnet18"), num_classes=5)


def test_convert_json(isthmus, bare):
    words = ("weights", "convert", bare, "out.pth", "--to", "detectron2", "--arch", "resnet18", "--json")
    found = json.loads(isthmus(*words).out)
    assert (found["path"], found["layout"], found["outputs"], found["pushed"]) == ("out.pth", "detectron2", None, None)
    assert found["tensors"]["same"]
    assert found["tensors"]["equal"] == 122
    assert "does not say which network it is (resnet18" in found["notes"][0]


def test_convert_takes_a_spec_of_ones_own(isthmus, ours, tmp_path):
    (tmp_path / "mine.toml").write_text(SPEC.to_toml())
    net = load(ours)
    torch.save(net.state_dict(), "bare.pth")
    words = ("weights", "convert", "bare.pth", "b.safetensors", "--to", "native", "--arch", "mine.toml")
    assert isthmus(*words).status == 0
    again = load("b.safetensors")
    assert again.spec == SPEC
    assert same(copied(again), copied(net))


def test_convert_pushes_the_folder(isthmus, bare, monkeypatch):
    seen = []
    monkeypatch.setattr(HfApi, "create_repo", lambda _, repo, **options: seen.append((repo, options)) or f"at/{repo}")
    monkeypatch.setattr(HfApi, "upload_folder", lambda _, **options: seen.append(options))
    words = ("weights", "convert", bare, "folder", "--to", "transformers", "--arch", "resnet18", "--push", "me/small")
    result = isthmus(*words)
    assert result.status == 0
    assert "pushed to at/me/small" in result.out
    assert seen[0] == ("me/small", {"exist_ok": True})
    assert (seen[1]["repo_id"], str(seen[1]["folder_path"])) == ("me/small", "folder")
    assert sorted(seen[1]["allow_patterns"]) == sorted(path.name for path in Path("folder").iterdir())


# -- verify ------------------------------------------------------------------------------------------------------------


def test_verify_against_equal_and_different_weights(isthmus, ours):
    net = load(ours)
    save_weights(net, "same.safetensors", layout="native")
    result = isthmus("weights", "verify", ours, "--against", "same.safetensors")
    assert (result.status, result.err) == (0, "")
    assert result.out.startswith("equal\n")
    assert "no difference; 1e-05 is allowed, computed in float64" in result.out

    with torch.no_grad():
        net.layer1[0].conv1.weight[0, 0] += 0.1
    save_weights(net, "other.safetensors")
    result = isthmus("weights", "verify", ours, "--against", "other.safetensors")
    assert (result.status, result.err) == (1, "")
    assert result.out.startswith("different\n")
    assert "1 different, by 1.0e-01 at most, in layer1.0.conv1.weight" in result.out

    found = json.loads(isthmus("weights", "verify", ours, "--against", "other.safetensors", "--json").out)
    assert list(found) == ["weights", "against", "equal", "outputs", "tensors", "notes"]
    assert (found["weights"], found["against"], found["equal"]) == (ours, "other.safetensors", False)
    assert found["outputs"]["relative"] > found["outputs"]["tolerance"] == 1e-5
    assert found["tensors"]["different"] == ["layer1.0.conv1.weight"]


def test_verify_with_outputs_that_are_no_numbers(isthmus, ours):
    net = load(ours)
    with torch.no_grad():
        net.fc.bias[0] = float("nan")
    save_weights(net, "nan.safetensors")
    result = isthmus("weights", "verify", ours, "--against", "nan.safetensors", "--json")
    assert result.status == 1
    found = json.loads(result.out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert (found["equal"], found["outputs"]["relative"]) == (False, None)


def test_verify_beside_a_library_on_pictures_of_ones_own(isthmus, tmp_path):
    class_folders(tmp_path / "photos", {"flower": 2})
    result = isthmus("weights", "verify", "demo", "--pictures", str(tmp_path / "photos"))
    assert (result.status, result.err) == (0, "")
    assert "onnxruntime" in result.out
    assert "the same best class for 2 of 2 pictures" in result.out


def test_verify_says_when_nothing_was_compared(isthmus, ours):
    result = isthmus("weights", "verify", ours)
    assert (result.status, result.out) == (2, "")
    assert "was not verified: no library known here has tiny under the names of layout native" in result.err
    assert "--against FILE" in result.err


# -- list --------------------------------------------------------------------------------------------------------------


def test_list_prints_what_it_printed_before(isthmus, golden):
    golden(
        "weights_list.txt",
        isthmus("weights", "list", "torchvision:resnet?0*").out + isthmus("weights", "list", "demo").out,
    )


def test_list_json(isthmus):
    found = json.loads(isthmus("weights", "list", "--json").out)
    assert [row["name"] for row in found] == list(CATALOG)
    (row,) = (row for row in found if row["name"] == "torchvision:resnet50.v2")
    assert (row["network"], row["params"], row["top1"], row["licence"]) == (
        "resnet50",
        25_557_032,
        80.858,
        "bsd-3-clause",
    )
    assert row["source"] == "https://download.pytorch.org/models/resnet50-11ad3fa6.pth"
    assert records.from_dict(Preprocess, row["preprocess"]).resize == 232


def test_list_by_network_and_by_part(isthmus):
    by_network = [row["name"] for row in json.loads(isthmus("weights", "list", "resnet152", "--json").out)]
    assert {"torchvision:resnet152.v1", "torchvision:resnet152.v2", "hf:microsoft/resnet-152"} <= set(by_network)
    assert all("resnet152" in name or name == "hf:microsoft/resnet-152" for name in by_network)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("inspect", "nothing.pth"), "there is no file nothing.pth"),
        (("inspect", "resnet50"), "is a network and names no weights"),
        (("inspect", "empty.pth"), "is empty"),
        (("convert", "bare.pth", "x.safetensors", "--to", "native"), "--arch"),
        (("convert", "bare.pth", "x.pth", "--to", "nonsense", "--arch", "resnet18"), "no layout 'nonsense'"),
        (("convert", "bare.pth", "x.onnx", "--to", "native", "--arch", "resnet18"), "must end in .safetensors"),
        (("convert", "bare.pth", "x.h5", "--to", "keras", "--arch", "resnet18"), "layout keras has no network like"),
        (
            ("convert", "bare.pth", "x.pth", "--to", "native", "--arch", "resnet5"),
            "there is no network named 'resnet5'",
        ),
        (("convert", "bare.pth", "x.pth", "--to", "native", "--arch", "no.toml"), "cannot read no.toml"),
        (
            ("convert", "bare.pth", "x.pth", "--to", "native", "--arch", "resnet18", "--push", "me/it"),
            "was not written",
        ),
        (("verify", "bare.pth", "--against", "nothing.pth"), "--arch"),
        (("list", "nonsense"), "no published weights match 'nonsense'"),
    ],
)
def test_mistakes_are_one_message(isthmus, bare, tmp_path, words, reason):
    (tmp_path / "empty.pth").touch()
    result = isthmus("weights", *words)
    assert result.status == 2
    assert result.err.startswith("isthmus: ")
    assert reason in result.err
    assert result.err.count("\n") == 1
    assert not list(tmp_path.glob("x.*"))


def test_missing_words_are_explained(isthmus):
    assert isthmus("weights", "convert", "a.pth").status == 2
