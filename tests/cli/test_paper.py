"""The commands models and plan: what they print, as tables and as JSON, and how they refuse."""

import json
import subprocess
import sys

import pytest

import isthmus as package
from isthmus import records
from isthmus.arch.spec import NetSpec
from isthmus.arch.variants import variant, variants

TOTALS = ["params", "macs", "flops", "activations", "receptive_field", "output_stride"]
ROW = ["name", "kind", "in_channels", "out_channels", "in_size", "out_size", "params", "macs", "activations", "flops"]
STRIP = [
    "name", "outer", "mid", "groups", "reduction", "macs", "pair_macs", "macs_ratio", "params_ratio",
    "equal_basic_width", "break_even_mid", "warnings",
]  # fmt: skip


def test_plan_prints_what_it_printed_before(isthmus, golden):
    result = isthmus("plan", "resnet50")
    assert (result.status, result.err) == (0, "")
    golden("plan_resnet50.txt", result.out)


def test_plan_json(isthmus):
    found = json.loads(isthmus("plan", "resnet50", "--json").out)
    assert list(found) == ["name", "image_size", *TOTALS, "rows", "economics", "spec"]
    assert (found["params"], found["macs"], found["flops"]) == (25_557_032, 4_089_184_256, 8_178_368_512)
    assert (found["name"], found["image_size"], found["receptive_field"], found["output_stride"]) == (
        "resnet50",
        [224, 224],
        427,
        32,
    )
    assert [list(row) for row in found["rows"]] == [ROW] * 6
    assert [row["name"] for row in found["rows"]] == ["stem", "layer1", "layer2", "layer3", "layer4", "head"]
    assert [list(strip) for strip in found["economics"]] == [STRIP] * 4
    assert records.from_dict(NetSpec, found["spec"]) == variant("resnet50")


@pytest.mark.parametrize(("by", "rows"), [("stage", 6), ("block", 18), ("layer", 4 + 16 * 8 + 4 * 2 + 2)])
def test_plan_by(isthmus, by, rows):
    found = json.loads(isthmus("plan", "resnet50", "--by", by, "--json").out)
    total = {key: sum(row[key] for row in found["rows"]) for key in ("params", "macs", "flops", "activations")}
    assert total == {key: found[key] for key in total}
    assert len(found["rows"]) == rows
    if by == "layer":
        assert {"conv1", "maxpool", "layer1.0.downsample.0", "layer4.2.bn3", "fc"} <= {
            row["name"] for row in found["rows"]
        }
    assert isthmus("plan", "resnet50", "--by", by).out.count("\n") > len(found["rows"])


def test_plan_options(isthmus):
    found = json.loads(
        isthmus(
            "plan", "resnet50", "--image-size", "97", "--in-channels", "1", "--num-classes", "0",
            "--output-stride", "8", "--set", "shortcut=avg", "--set", "stages.0.mid=32", "--json",
        ).out
    )  # fmt: skip
    assert (found["image_size"], found["output_stride"]) == ([97, 97], 8)
    assert (found["spec"]["in_channels"], found["spec"]["num_classes"], found["spec"]["shortcut"]) == (1, 0, "avg")
    assert found["spec"]["stages"][0]["mid"] == 32
    assert found["spec"]["stages"][3]["dilation"] == 4


def test_plan_reads_a_spec(isthmus, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(variant("ecaresnet50t").to_toml(), encoding="utf-8")
    found, wanted = (json.loads(isthmus("plan", name, "--json").out) for name in (str(path), "ecaresnet50t"))
    assert found == wanted
    assert isthmus("plan", str(path)).out == isthmus("plan", "ecaresnet50t").out


def test_cifar_nets_are_planned_at_32(isthmus):
    assert json.loads(isthmus("plan", "resnet20_cifar", "--json").out)["image_size"] == [32, 32]
    assert "at 32×32" in isthmus("plan", "resnet20_cifar").out


@pytest.mark.parametrize(("mid", "words"), [(8, "the strip is narrow"), (400, "the strip saves nothing")])
def test_plan_warns_in_plain_words(isthmus, mid, words):
    result = isthmus("plan", "resnet50", "--set", f"stages.0.mid={mid}")
    assert result.status == 0
    assert f"warning layer1: {words}" in result.out
    assert "warning" not in isthmus("plan", "resnet50").out


def test_plan_says_what_training_holds(isthmus):
    arguments = ("plan", "resnet50", "--train", "--batch", "8", "--memory", "recompute", "--precision", "bf16", "--ema")
    found = json.loads(isthmus(*arguments, "--json").out)["training_bytes"]
    total = found.pop("total")
    assert list(found) == ["weights", "gradients", "optimizer", "average", "saved", "transient"]
    assert sum(found.values()) == total
    assert found["gradients"] == 4 * package.cost("resnet50").params
    table = isthmus(*arguments).out
    assert f"Training: {total / 2**30:.2f} GiB (8 pictures, bf16, memory recompute)" in table
    assert f"{found['saved'] / 2**20:,.0f}" in table
    assert "Training" not in isthmus("plan", "resnet50", "--batch", "8").out


def test_models(isthmus):
    found = json.loads(isthmus("models", "--json").out)
    assert [row["name"] for row in found] == variants()
    assert [list(row) for row in found] == [["name", *TOTALS]] * len(found)
    table = isthmus("models", "resnext*").out
    assert table.startswith(f"{len(variants('resnext*'))} networks")
    assert all(name in table for name in variants("resnext*"))
    at_97 = json.loads(isthmus("models", "resnet18", "--image-size", "97", "--json").out)[0]
    assert at_97["macs"] == package.cost("resnet18", 97).macs


MISTAKES = {
    "unknown network": (["plan", "resnet5O"], "there is no network named 'resnet5O'; did you mean resnet50"),
    "no network": (["plan"], "--network"),
    "unknown command": (["plam"], "plam"),
    "unknown option": (["plan", "resnet50", "--imagesize", "97"], "Unknown option: --imagesize"),
    "one argument too many": (["plan", "resnet50", "resnet18"], "resnet18"),
    "not a number": (["plan", "resnet50", "--image-size", "big"], "--image-size"),
    "negative size": (["plan", "resnet50", "--image-size", "-5"], "image size -5"),
    "unknown level": (["plan", "resnet50", "--by", "width"], "--by"),
    "no file": (["plan", "absent.toml"], "cannot read absent.toml: No such file"),
    "no setting": (["plan", "resnet50", "--set", "mid"], "not of the form field=value"),
    "unknown setting": (["plan", "resnet50", "--set", "stages.7.mid=3"], "there is no '7'; known: 0, 1, 2, 3"),
    "wrong value": (["plan", "resnet50", "--set", "shortcut=long"], "shortcut is 'long'"),
    "impossible": (["plan", "resnext50_32x4d", "--set", "stages.0.groups=5"], "5 groups do not divide a strip of 128"),
    "no channels": (["plan", "resnet50", "--in-channels", "0"], "in_channels is 0"),
    "output stride": (["plan", "resnet50", "--output-stride", "2"], "output_stride 2 is below the stem's own 4"),
    "no such output stride": (["plan", "resnet50", "--output-stride", "12"], "output_stride 12"),
    "no pictures": (["plan", "resnet50", "--train", "--batch", "0"], "batch is 0"),
    "unknown memory": (["plan", "resnet50", "--train", "--memory", "little"], "--memory"),
    "no match": (["models", "zzz"], "no network matches 'zzz'; `isthmus models` lists all"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_message_and_exit_2(isthmus, mistake):
    arguments, words = MISTAKES[mistake]
    result = isthmus(*arguments)
    assert result.status == 2
    assert result.out == ""
    assert words in " ".join(result.err.replace("│", " ").split())
    assert "Traceback" not in result.err
    if result.err.startswith("isthmus: "):
        assert result.err.count("\n") == 1


@pytest.mark.parametrize("command", ["plan", "models"])
def test_no_pixels_is_a_mistake(isthmus, command):
    result = isthmus(command, "resnet18", "--image-size", "0")
    assert (result.status, result.out) == (2, "")
    assert "image size 0" in result.err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("stages = [", "not a TOML document"),
        ("stages = 3", "stages must be a table of settings"),
        ("[[stages]]\ndepth = 1\nmid = 8", "out"),
        ("[[stages]]\ndepth = 1\nmid = 8\nout = 32\nwidth = 2", "unknown setting stages.0.width"),
    ],
)
def test_mistakes_in_a_file_name_it(isthmus, tmp_path, content, words):
    path = tmp_path / "mine.toml"
    path.write_text(content, encoding="utf-8")
    result = isthmus("plan", str(path))
    assert (result.status, result.out) == (2, "")
    assert words in result.err
    assert str(path) in result.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["resnetblur18", "--image-size", "16"], "enlarge the image"),
        (["resnet18", "--set", "stages.0.block=mine"], "isthmus.nn.trace.trace_cost"),
    ],
)
def test_nothing_is_printed_before_a_mistake_is_found(isthmus, arguments, words):
    result = isthmus("plan", *arguments)
    assert result.status == 2
    assert words in result.err
    assert result.out == ""


def python(*arguments):
    """A fresh interpreter."""
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


def test_plan_loads_no_torch():
    code = (
        "import sys; from isthmus.cli.main import main; sys.argv = ['isthmus', 'plan', 'resnet50', '--json']; main();"
        "heavy = {'torch', 'torchvision', 'numpy', 'PIL', 'onnx', 'safetensors'} & set(sys.modules);"
        "sys.exit(f'loaded: {sorted(heavy)}' if heavy else 0)"
    )
    result = python("-c", code)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["params"] == 25_557_032


def test_module_and_version():
    result = python("-m", "isthmus", "plan", "resnet5O")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("isthmus: there is no network named 'resnet5O'")
    assert python("-m", "isthmus", "--version").stdout.strip()
