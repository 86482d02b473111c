"""Any valid spec builds and its plan is true; any other raises a SpecError and nothing else."""

from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus import records
from isthmus.arch.block import Activation, AntiAlias, Attention, BlockSpec, Norm, Shortcut
from isthmus.arch.cost import cost
from isthmus.arch.economics import economics
from isthmus.arch.plan import plan
from isthmus.arch.spec import HeadSpec, NetSpec, StageSpec, StemSpec
from isthmus.arch.variants import variant
from isthmus.errors import SpecError
from isthmus.nn.network import ResNet
from oracles import assert_plan_is_true

POOLS = ["max", "max_zero", "max_ceil", "conv", "none"]


@st.composite
def stages(draw, block, norm, dilates):
    cardinality = draw(st.sampled_from([1, 1, 2, 4])) if block != "basic" else 1
    unit = 64 if norm == "group" else 4 * cardinality  # torch refuses group norm over one value
    mid = unit * draw(st.integers(1, 3))
    return StageSpec(
        depth=draw(st.integers(1, 3)),
        mid=mid,
        out=unit * draw(st.integers(1, 4)),
        block=block,
        stride=draw(st.integers(1, 3 if dilates else 2)),
        stride_block=draw(st.sampled_from(["first", "last"])),
        groups=cardinality,
        reduce=draw(st.sampled_from([0, unit])) if block != "basic" else 0,
        dilation=draw(st.integers(1, 2)) if dilates else 1,
        first_dilation=draw(st.integers(0, 2)) if dilates else 0,
    )


@st.composite
def specs(draw, *, dilates=True):
    """Specs that hold to every documented rule."""
    preact = draw(st.booleans())
    dims = draw(st.sampled_from([1, 2, 2, 3]))
    norm = draw(st.sampled_from(["batch", "batch", "group", "leading" if preact else "none"]))
    stride_at = draw(st.sampled_from(["conv1", "conv2", "conv2"]))
    anti_alias = (
        "none" if preact or dims != 2 or stride_at == "conv1" else draw(st.sampled_from(["none", "avg", "blur"]))
    )
    kinds = ["preact_bottleneck"] if preact else ["bottleneck", "basic"]
    rows = draw(
        st.lists(st.sampled_from(kinds).flatmap(lambda kind: stages(kind, norm, dilates)), min_size=1, max_size=3)
    )
    widths = draw(st.sampled_from([(64,), (64, 64, 64)] if norm == "group" else [(8,), (32,), (8, 8, 32)]))
    taps = [*draw(st.lists(st.sampled_from(["stem", "layer1"]), max_size=2, unique=True)), "last"]
    grows = [row.out for row in rows] == sorted(row.out for row in rows) and rows[0].out >= widths[-1]
    return NetSpec(
        stages=tuple(rows),
        stem=StemSpec(
            widths=widths,
            kernel=3 if len(widths) == 3 else draw(st.sampled_from([1, 3, 5, 7])),
            stride=draw(st.integers(1, 2)),
            pool="max" if anti_alias != "none" else draw(st.sampled_from(POOLS)),
            bias=draw(st.booleans()),
        ),
        head=HeadSpec(
            taps=tuple(taps),
            pools=draw(st.sampled_from([("avg",), ("max",), ("avg", "max")])),
            hidden=draw(st.sampled_from([0, 5])),
        ),
        shortcut=draw(st.sampled_from(["none", "conv1", "conv3", "avg", "maxpool", *["pad"] * grows])),
        stride_at=stride_at,
        norm=norm,
        activation=draw(st.sampled_from(["relu", "silu"])),
        attention=draw(st.sampled_from(["none", "none", "se", "eca"])),
        anti_alias=anti_alias,
        drop_path=draw(st.sampled_from([0.0, 0.2])),
        dims=dims,
        in_channels=draw(st.integers(1, 4)),
        num_classes=draw(st.integers(0, 5)),
    )


@st.composite
def sizes(draw, dims, least, most):
    return tuple(draw(st.integers(least, most)) for _ in range(dims))


@given(st.data())
@settings(max_examples=100)
def test_any_valid_spec_builds_and_its_plan_is_true(data):
    spec = data.draw(specs())
    laid_out = plan(spec, data.draw(sizes(spec.dims, 33, 70 if spec.dims < 3 else 40)))
    with torch.device("meta"):
        net = ResNet(laid_out).eval()
    assert_plan_is_true(net)
    economics(laid_out)
    assert NetSpec.from_toml(spec.to_toml()) == spec
    assert records.from_dict(NetSpec, records.to_dict(spec)) == spec


@given(st.data())
@settings(max_examples=150)
def test_any_small_image_runs_or_is_refused_on_paper(data):
    spec = data.draw(specs())
    laid_out = plan(spec, data.draw(sizes(spec.dims, 1, 9)))
    try:
        cost(laid_out).totals  # noqa: B018 - worked out when asked for
    except SpecError:
        return
    assert_plan_is_true(ResNet(laid_out).eval())  # on the CPU: the meta kernels allow more


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 70),
    st.floats(),
    st.sampled_from(
        ["", "none", "conv1", "avg", "basic", "preact_bottleneck", "identity", "se", "blur", "group", "é\x00"]
    ),
    st.lists(st.integers(-1, 9), max_size=4).map(tuple),
    st.lists(st.sampled_from(["last", "stem", "avg", 3]), max_size=3).map(tuple),
    st.just({}),
    st.just(object()),
)


def survives(make):
    """Whether `make()` gives a spec that lays out and costs; anything it raises must be a SpecError."""
    try:
        laid_out = plan(make(), 40)
        cost(laid_out).totals  # noqa: B018
        economics(laid_out)
    except SpecError:
        return False
    return True


@given(st.data())
@settings(max_examples=400)
def test_any_wrong_field_is_a_spec_error(data):
    """One or two fields of a good spec replaced by anything at all."""
    values = records.to_dict(
        data.draw(st.sampled_from(["resnet10t", "resnet14t", "test_resnet", "resnetv2_50"]).map(variant))
    )
    for _ in range(data.draw(st.integers(1, 2))):
        table, cls = data.draw(
            st.sampled_from(
                [
                    (values, NetSpec),
                    (values["stages"][-1], StageSpec),
                    (values["stem"], StemSpec),
                    (values["head"], HeadSpec),
                ]
            )
        )
        name = data.draw(st.sampled_from([field.name for field in fields(cls)]))
        table[name] = data.draw(ODD)
        if not all(
            isinstance(values.get(part), kind) for part, kind in (("stages", list), ("stem", dict), ("head", dict))
        ):
            break
    survives(lambda: records.from_dict(NetSpec, values))


@given(st.data())
@settings(max_examples=300)
def test_any_block_is_made_or_is_a_spec_error(data):
    choices = {
        "shortcut": st.sampled_from(Shortcut.__args__),
        "norm": st.sampled_from(Norm.__args__),
        "activation": st.sampled_from(Activation.__args__),
        "attention": st.sampled_from(Attention.__args__),
        "anti_alias": st.sampled_from(AntiAlias.__args__),
        "stride_at": st.sampled_from(["conv1", "conv2"]),
        "dims": st.integers(1, 3),
        "stride": st.integers(-1, 3),
        "groups": st.sampled_from([-1, 0, 1, 2, 5]),
        "dilation": st.integers(-1, 3),
        "first_dilation": st.integers(-1, 3),
        "reduce": st.sampled_from([-4, 0, 3, 4, 32]),
    }
    widths = {name: st.sampled_from([-1, 0, 1, 4, 32, 64]) for name in ("in_channels", "mid", "out_channels")}
    widths["kind"] = st.sampled_from(["bottleneck", "basic", "preact_bottleneck"])
    values = data.draw(st.fixed_dictionaries(widths, optional=choices))
    try:
        spec = BlockSpec(**values)
    except SpecError:
        return
    size = (9,) * spec.dims
    for path in (spec.main, spec.downsample):
        at = size
        for layer in path:
            at = layer.out_size(at)
        assert not path or at == tuple(-(-side // spec.stride) for side in size)


@given(st.text(max_size=200))
def test_any_text_is_a_spec_error(text):
    assert not survives(lambda: NetSpec.from_toml(text))


@given(st.data())
@settings(max_examples=200)
def test_any_damage_to_a_toml_file_is_a_spec_error(data):
    text = variant(data.draw(st.sampled_from(["resnet10t", "ecaresnet26t", "test_resnet", "resnet20_cifar"]))).to_toml()
    place = data.draw(st.integers(0, len(text)))
    cut = data.draw(st.integers(0, 8))
    survives(lambda: NetSpec.from_toml(text[:place] + data.draw(st.text(max_size=4)) + text[place + cut :]))


@pytest.mark.parametrize("output_stride", [8, 16, 32])
@given(data=st.data())
@settings(max_examples=30)
def test_any_output_stride(output_stride, data):
    spec = data.draw(specs(dilates=False))
    dilated = spec.with_output_stride(output_stride)
    laid_out = plan(dilated, (40,) * spec.dims)
    assert laid_out.output_stride == min(output_stride, plan(spec, (40,) * spec.dims).output_stride)
    with torch.device("meta"):
        assert_plan_is_true(ResNet(laid_out).eval())
