"""Specs as TOML, as plain values, and with settings changed; what is wrong with one is said in words."""

import json
import math

import pytest

from isthmus import records
from isthmus.arch.block import BlockSpec
from isthmus.arch.plan import plan
from isthmus.arch.preprocess import Preprocess
from isthmus.arch.spec import HeadSpec, NetSpec, StageSpec, StemSpec
from isthmus.arch.variants import variant, variants
from isthmus.errors import ShortcutError, SpecError

STAGE = StageSpec(depth=1, mid=8, out=32)


@pytest.mark.parametrize("name", variants())
def test_round_trips(name):
    spec = variant(name)
    assert NetSpec.from_toml(spec.to_toml()) == spec
    assert records.from_dict(NetSpec, records.to_dict(spec)) == spec
    assert records.from_dict(NetSpec, json.loads(json.dumps(records.to_dict(spec, defaults=False)))) == spec


def test_every_field_round_trips():
    spec = NetSpec(
        stages=(StageSpec(depth=2, mid=32, out=64, stride=2, stride_block="last", groups=4, dilation=2), STAGE),
        stem=StemSpec(widths=(8, 8, 16), kernel=3, stride=1, pool="conv"),
        head=HeadSpec(taps=("layer1", "last"), pools=("avg", "max"), hidden=7),
        shortcut="avg",
        norm="none",
        norm_eps=1e-3,
        activation="silu",
        attention="se",
        attention_ratio=0.25,
        drop_path=0.1,
        dims=3,
        in_channels=1,
        num_classes=0,
        name='a "name" with \\ and a\nline',
    )
    assert NetSpec.from_toml(spec.to_toml()) == spec
    assert records.from_dict(NetSpec, records.to_dict(spec)) == spec


def test_toml_is_a_row_a_stage_and_what_departs_from_the_defaults():
    assert variant("resnet50d").to_toml() == (
        'shortcut = "avg"\nname = "resnet50d"\n\n'
        + "".join(
            f"[[stages]]\ndepth = {depth}\nmid = {mid}\nout = {4 * mid}\n{stride}\n"
            for depth, mid, stride in (
                (3, 64, ""),
                (4, 128, "stride = 2\n"),
                (6, 256, "stride = 2\n"),
                (3, 512, "stride = 2\n"),
            )
        )
        + "[stem]\nwidths = [32, 32, 64]\nkernel = 3\n"
    )


def test_override():
    spec = records.override(
        variant("resnet50"),
        ["shortcut=avg", "stages.0.mid = 32", "stem.widths=[8, 8, 16]", "stem.kernel=3", "norm_eps=1e-3"],
    )
    assert (spec.shortcut, spec.stages[0].mid, spec.stem.widths, spec.norm_eps) == ("avg", 32, (8, 8, 16), 1e-3)
    assert spec.stages[1:] == variant("resnet50").stages[1:]
    assert records.override(variant("resnet50"), []) == variant("resnet50")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("shortcut", "not of the form field=value"),
        ("=3", "not of the form field=value"),
        ("shortcut=", "not of the form field=value"),
        ("shortcuts=avg", "there is no 'shortcuts'; known: stages, stem, head, shortcut"),
        ("stages.9.mid=3", "there is no '9'; known: 0, 1, 2, 3"),
        ("stages.-1.mid=3", "there is no '-1'"),
        ("stages.first.mid=3", "there is no 'first'; known: 0, 1, 2, 3"),
        ("stages.0=3", "name a field of the row too"),
        ("stages.0.middle=3", "there is no 'middle'; known: depth, mid, out"),
        ("norm.eps=1", "there is no 'norm'"),
        ("stem.widths.0=3", "give the whole list, e.g. stem.widths=[64]"),
        ("stages.0.mid=wide", "mid is 'wide'; it must be a whole number"),
        ("stages.0.mid=1.5", "mid is 1.5; it must be a whole number"),
        ("stages=3", "stages must be a table of settings; got 3"),
        ("shortcut=long", "shortcut is 'long'; it must be one of none, identity, pad"),
        ("shortcut=identity", "name a kind that can change a shape"),
        ("drop_path=1", "drop_path is 1; it must lie in"),
        ("norm_eps=nan", "norm_eps is nan"),
        ("norm_eps=inf", "norm_eps is inf"),
        ("head.taps=[]", "head.taps is empty"),
        ('head.taps=["layer9"]', "head.taps names 'layer9'; known: stem, layer1"),
        ("stem.widths=[]", "give one (k×k) or three (3×3)"),
        ("stem.widths=[1,2]", "give one (k×k) or three (3×3)"),
        ("stem.widths=[8,8,8]", "a stem of three convolutions has kernel 3"),
        ("stem.kernel=4", "stem.kernel is 4; it must be odd"),
        ("dims=4", "dims is 4"),
        ("in_channels=0", "in_channels is 0"),
        ("num_classes=-1", "num_classes is -1"),
        ("stages.0.depth=0", "depth is 0"),
        ("stages.0.stride=0", "stride is 0"),
        ("stages.0.block=a b", "block is 'a b'"),
        ("stages.0.block=preact_bottleneck", "cannot be mixed"),
        ("norm=leading", "norm is 'leading'"),
        ("anti_alias=avg\n", "must be 'max'"),
    ],
)
def test_override_errors(setting, message):
    spec = variant("resnetrs50" if "anti_alias" in setting else "resnet50")
    with pytest.raises(SpecError) as caught:
        records.override(spec, [setting])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages = [", "not a TOML document"),
        ("", "stages"),
        ("stages = []", "at least one stage"),
        ("[stages]\ndepth = 1", "stages"),
        ("[[stages]]\ndepth = 1\nmid = 8", "out"),
        ("[[stages]]\ndepth = 1\nmid = 8\nout = 32\nwidth = 3", "unknown setting stages.0.width"),
        ("[[stages]]\ndepth = true\nmid = 8\nout = 32", "stages.0: depth is True; it must be a whole number"),
        ("stem = 3\n[[stages]]\ndepth = 1\nmid = 8\nout = 32", "stem must be a table"),
        ("stem = [3]\n[[stages]]\ndepth = 1\nmid = 8\nout = 32", "stem"),
        ("[[stages]]\ndepth = 1\nmid = 8\nout = 32\n[[stem]]\nkernel = 3", "stem"),
        ("[[stages]]\ndepth = 1979-05-27\nmid = 8\nout = 32", "depth"),
    ],
)
def test_toml_errors(text, message):
    with pytest.raises(SpecError) as caught:
        NetSpec.from_toml(text)
    assert message in str(caught.value)


def test_file_errors_name_the_file(tmp_path):
    for name, content in {"bad.toml": b"stages = 3", "binary.toml": b"\xff\xfe\x00"}.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder.toml").mkdir()
    for name in ("bad", "binary", "absent", "folder"):
        with pytest.raises(SpecError, match=rf"{name}\.toml"):
            NetSpec.from_file(tmp_path / f"{name}.toml")
    good = tmp_path / "good.toml"
    good.write_text(variant("ecaresnet50t").to_toml(), encoding="utf-8")
    assert NetSpec.from_file(good) == variant("ecaresnet50t")


def test_unknown_variant_names_the_nearest():
    with pytest.raises(SpecError, match=r"no network named 'resnet5O'; did you mean .*resnet50"):
        variant("resnet5O")
    with pytest.raises(SpecError, match="did you mean resnet50"):
        variant("")
    with pytest.raises(SpecError, match="no network named 'plain50'"):
        variant("plain50")


def test_variants_patterns():
    names = variants()
    assert len(names) == len(set(names))
    assert (
        len(
            [
                name
                for name in names
                if "cifar" not in name and "v1" not in name and "v2" not in name and "keras" not in name
            ]
        )
        == 79
    )
    assert variants("resnext*d") == [name for name in names if name.startswith("resnext") and name.endswith("d")]
    assert variants("senet154") == ["senet154"]
    assert variants("nothing") == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"out_channels": 0}, "widths must be at least 1"),
        ({"mid": -4}, "widths must be at least 1"),
        ({"stride": 0}, "stride, dilation and groups"),
        ({"groups": 3}, "3 groups do not divide a strip of 16 → 16"),
        ({"groups": 4, "reduce": 6}, "4 groups do not divide a strip of 6 → 16"),
        ({"kind": "basic", "groups": 2}, "a basic block has no groups"),
        ({"kind": "basic", "stride_at": "conv1"}, "a basic block has no groups"),
        ({"norm": "group"}, "divisible by 32"),
        ({"kind": "preact_bottleneck", "norm": "none"}, "needs a norm"),
        ({"norm": "leading"}, "no norm leads a bottleneck block"),
        ({"kind": "preact_bottleneck", "anti_alias": "avg"}, "no anti-aliasing"),
        ({"anti_alias": "blur", "stride_at": "conv1"}, "stride must be at conv2"),
        ({"anti_alias": "avg", "dims": 1}, "dims=1"),
    ],
)
def test_block_errors(settings, message):
    with pytest.raises(SpecError) as caught:
        BlockSpec(**({"kind": "bottleneck", "in_channels": 64, "mid": 16, "out_channels": 64} | settings))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "shortcut"),
    [
        ({"out_channels": 128}, "identity"),
        ({"stride": 2}, "identity"),
        ({"out_channels": 128}, "maxpool"),
        ({"out_channels": 32}, "pad"),
    ],
)
def test_shortcut_errors_on_paper(settings, shortcut):
    values = {"kind": "bottleneck", "in_channels": 64, "mid": 16, "out_channels": 64} | settings
    with pytest.raises(ShortcutError, match="main path turns 64 channels into"):
        BlockSpec(**values, shortcut=shortcut)
    BlockSpec(**values, shortcut="conv1")


@pytest.mark.parametrize("size", [0, -3, 2.5, True, "224", (224,), (224, 224, 3), (224, 0), (224, "3")])
def test_image_size_errors(size):
    with pytest.raises(SpecError, match="image size"):
        plan("resnet18", size)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mean": (0.5,)}, "1 means and 3 deviations"),
        ({"std": (0.1, 0.2, 0.0)}, "std"),
        ({"channels": "GBR"}, "channels is 'GBR'; it must be one of RGB, BGR, L"),
        ({"interpolation": "nearest"}, "interpolation is 'nearest'"),
        ({"crop": 300}, "crops 300 px out of 256"),
        ({"crop": 0}, "crops 0 px"),
    ],
)
def test_preprocess_errors(values, message):
    with pytest.raises(SpecError) as caught:
        Preprocess(**values)
    assert message in str(caught.value)


def test_preprocess_round_trip():
    record = Preprocess(
        resize=232, crop=200, squash=True, interpolation="bicubic", channels="L", mean=(0.5,), std=(0.2,)
    )
    assert records.from_dict(Preprocess, json.loads(json.dumps(records.to_dict(record)))) == record
    assert Preprocess().at(112) == Preprocess(resize=128, crop=112)


def test_what_json_has_no_word_for_is_null():
    values = {"a": math.nan, "b": [1.0, math.inf, {"c": -math.inf, "d": "nan"}], "e": 3, "f": None}
    found = {"a": None, "b": [1.0, None, {"c": None, "d": "nan"}], "e": 3, "f": None}
    assert records.finite(values) == found
    json.dumps(found, allow_nan=False)
