"""Planted faults: every one is named, in several networks, with the figures and the mend."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from diagnosed import CAFFE, HALF, SIDE, crops, made, settled, shrunk, trained
from isthmus.arch.preprocess import IMAGENET
from isthmus.arch.variants import variant
from isthmus.data.transform import normalise
from isthmus.diagnose.diagnosis import diagnose
from isthmus.diagnose.hypotheses import hypotheses
from isthmus.nn.batchnorm import BatchNorm, precise_batchnorm
from isthmus.nn.freeze import freeze
from isthmus.nn.network import ResNet

SUBJECTS = ("resnext50_32x4d", "resnet50d", "resnetv2_50")
STRIDED = ("resnext50_32x4d", "resnet50d", "resnetv2_50", "seresnet50")


def kinds(found):
    """Kinds of the faults and warnings, worst first."""
    return [each.kind for each in found.findings if each.severity != "note"]


def only(found, kind):
    """The one finding of a kind."""
    (finding,) = (each for each in found.findings if each.kind == kind)
    return finding


def norms(net):
    return {name: module for name, module in net.named_modules() if isinstance(module, BatchNorm)}


@pytest.fixture(scope="module", params=SUBJECTS)
def net(request, settling):
    """A healthy network, given back whole after each test."""
    found = settled(made(shrunk(request.param)), settling[0])
    state = {key: value.clone() for key, value in found.state_dict().items()}
    return found, state


@pytest.fixture
def subject(net):
    found, state = net
    found.load_state_dict(state)
    for norm in norms(found).values():
        norm.momentum = 0.1
    freeze(found, "none")
    return found.eval()


def test_training_mode_left_on(subject, shown):
    found = diagnose(subject.train(), shown[0], batch=32)
    assert kinds(found) == ["training_mode"]
    finding = only(found, "training_mode")
    assert finding.severity == "fault"
    assert f"{len(norms(subject))} batch norms act so: normalised by the batch, " in finding.found
    assert finding.mend == "Call net.eval() before it predicts."


def test_a_part_in_training_mode(subject, shown):
    subject.layer2.train()
    found = diagnose(subject, shown[0])
    assert kinds(found) == ["mixed_mode"]
    finding = only(found, "mixed_mode")
    assert finding.where.startswith("layer2.0.")
    x, part = normalise(shown[0], subject.preprocess), copy.deepcopy(subject)
    with torch.no_grad():  # the norms of this stage alone by the batch
        moved = torch.cat([part(batch) for batch in x.split(32)]).argmax(1) != subject.eval()(x).argmax(1)
    assert f"normalised by the batch, {int(moved.sum())} of 48 predictions are others" in finding.found
    assert {row.mode for row in found.norms} == {"training", "evaluating"}


def test_norms_that_evaluate_but_are_not_frozen(subject, shown):
    subject.train()
    for norm in norms(subject).values():
        norm.eval()
    found = diagnose(subject, shown[0])
    assert [(each.kind, each.severity) for each in found.findings if each.severity != "note"] == [
        ("mixed_mode", "warning")
    ]
    freeze(subject, "trunk")
    assert [(each.kind, each.severity) for each in diagnose(subject.train(), shown[0]).findings] == [
        ("training_mode", "note")
    ]


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_momentum(subject, shown, momentum):
    for norm in norms(subject).values():
        norm.momentum = momentum
    found = diagnose(subject, shown[0])
    assert kinds(found) == ["momentum"]
    count = len(norms(subject))
    assert f"{count} of {count} batch norms have momentum {momentum:g}" in only(found, "momentum").found
    freeze(subject, "trunk")
    assert diagnose(subject, shown[0]).healthy


def test_a_cumulative_mean_is_fine(subject, shown):
    for norm in norms(subject).values():
        norm.momentum = None
    assert diagnose(subject, shown[0]).healthy


@pytest.mark.parametrize("variance", [0.0, 1e-9])
def test_next_to_no_variance(subject, shown, variance):
    name, norm = list(norms(subject).items())[4]
    norm.running_var[:2] = variance
    found = diagnose(subject, shown[0])
    assert kinds(found) == ["zero_variance"]
    finding = only(found, "zero_variance")
    assert finding.where == name
    assert finding.severity == "fault"
    assert finding.found.startswith("2 channels have a running variance below their norm's eps")
    row = next(row for row in found.norms if row.name == name)
    assert row.least_variance == pytest.approx(variance)


def test_a_channel_that_never_varies_is_no_fault(subject, shown):
    """Of a channel whose filter is 0 the variance is rightly 0."""
    conv, norm = ("conv1", "bn2") if subject.spec.preact else ("conv1", "bn1")
    with torch.no_grad():
        subject.layer2[0].get_submodule(conv).weight[3] = 0.0
    subject.layer2[0].get_submodule(norm).running_mean[3] = 0.0
    subject.layer2[0].get_submodule(norm).running_var[3] = 0.0
    assert "zero_variance" not in kinds(diagnose(subject, shown[0]))


@pytest.mark.parametrize(("batch", "severity"), [(1, "fault"), (4, "warning"), (8, "note"), (16, None)])
def test_small_batches(subject, shown, batch, severity):
    found = diagnose(subject, shown[0], batch=batch)
    assert [each.severity for each in found.findings if each.kind == "small_batch"] == [severity] * (
        severity is not None
    )
    assert set(kinds(found)) <= {"small_batch"}
    assert all(row.noise > 0 for row in found.norms)
    # Half as many pictures, 1.4 times the noise; and every channel has so many values.
    double = diagnose(subject, shown[0], batch=2 * batch)
    for row, other in zip(found.norms, double.norms, strict=True):
        assert row.noise == pytest.approx(other.noise * 2**0.5)
        assert 2 * row.values == other.values
    freeze(subject, "trunk")
    assert kinds(diagnose(subject, shown[0], batch=batch)) == []


def test_noise_is_what_batches_of_pictures_show(shown):
    """Against the means of many batches drawn from the same pictures, at the first norm."""
    net = settled(made(shrunk("resnet26")), shown[0])
    row = next(row for row in diagnose(net, *shown, batch=8).norms if row.name == "bn1")
    with torch.no_grad():
        maps = net.conv1(normalise(shown[0], net.preprocess)).double()
    random = torch.Generator().manual_seed(0)
    draws = torch.stack([maps[torch.randint(48, (8,), generator=random)].mean((0, 2, 3)) for _ in range(2000)])
    wanted = (draws.var(0) / maps.transpose(0, 1).flatten(1).var(1)).mean().sqrt()
    assert row.noise == pytest.approx(float(wanted), rel=0.05)


def reset(net, _images):
    """As before training: statistics that never moved."""
    for norm in norms(net).values():
        norm.reset_running_stats()


def outgrown(net, _images):
    """Weights that went on where statistics stayed."""
    with torch.no_grad():
        for name, module in net.named_modules():
            if isinstance(module, nn.Conv2d) and "se" not in name.split("."):
                module.weight *= 3.0


def of_another_kind(net, images):
    """Statistics of nearly black pictures, where the others are not."""
    settled(net, images // 16)


@pytest.mark.parametrize("fault", [reset, outgrown, of_another_kind], ids=lambda fault: fault.__name__)
def test_stale_statistics(subject, settling, shown, fault):
    fault(subject, settling[0])
    found = diagnose(subject, shown[0])
    assert "stale_statistics" in kinds(found)
    finding = only(found, "stale_statistics")
    x = normalise(shown[0], subject.preprocess)
    exact = copy.deepcopy(subject)
    precise_batchnorm(exact, x.split(32))
    with torch.no_grad():
        moved = int((subject(x).argmax(1) != exact(x).argmax(1)).sum())
    assert f"With exact ones {moved} of 48 predictions change." in finding.found
    assert finding.severity == ("fault" if moved > 4.8 else "warning")
    assert "isthmus.precise_batchnorm(net, batches)" in finding.mend
    assert f"of {len(norms(subject))} batch norms have running statistics that are not those of the pictures" in (
        finding.found
    )
    settled(subject, settling[0])  # the cure that it names
    assert diagnose(subject, shown[0]).healthy


def test_without_classes_what_comes_out_is_compared(settling, shown):
    net = settled(made(replace(shrunk("resnet26"), num_classes=0)), settling[0])
    reset(net, None)
    finding = only(diagnose(net, shown[0]), "stale_statistics")
    x, exact = normalise(shown[0], net.preprocess), copy.deepcopy(net)
    precise_batchnorm(exact, x.split(32))
    with torch.no_grad():
        part = float((net(x) - exact(x)).norm() / exact(x).norm())
    assert finding.found.endswith(f"With exact ones what comes out changes by {part:.0%} of its size.")


def test_no_pass_keeps_maps_for_gradients(settling, shown, monkeypatch):
    """Those of every picture at once would not fit the memory; without labels nothing needs them."""
    net, forward, kept = settled(made(shrunk("resnet26")), settling[0]), ResNet.forward, []
    reset(net, None)
    monkeypatch.setattr(ResNet, "forward", lambda net, x: kept.append(torch.is_grad_enabled()) or forward(net, x))
    assert "stale_statistics" in kinds(diagnose(net, shown[0]))
    assert len(kept) > 4
    assert not any(kept)


def test_what_is_left_of_starting_values_is_told(shown, settling):
    net = trained(made(shrunk("resnet26")), *settling, steps=8)
    finding = only(diagnose(net, *shown), "stale_statistics")
    assert "after 8 batches, 43% of it is what it was before them" in finding.found


def test_frozen_statistics_are_noted(subject, shown):
    reset(subject, None)
    freeze(subject, "trunk")
    found = diagnose(subject, shown[0])
    assert found.healthy
    assert only(found, "frozen_statistics").severity == "note"
    assert {row.mode for row in found.norms} == {"frozen"}


def test_statistics_that_serve_are_no_fault(settling, shown):
    """Statistics of other pictures with which the network is right, as a trunk trained elsewhere has them."""
    net = settled(made(shrunk("resnet26")), settling[0] // 16)
    for norm in norms(net).values():
        norm.eval()
    features = net.pooled(torch.zeros(1, 3, SIDE, SIDE)).shape[1]
    with torch.no_grad():  # a classifier on what the network gives with them: least squares
        x = net.pooled(normalise(shown[0], net.preprocess)).double()
        wanted = torch.eye(4, dtype=torch.float64)[shown[1]] * 10
        solution = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], 1), wanted).solution
        net.fc.weight.copy_(solution[:features].T)
        net.fc.bias.copy_(solution[features])
    finding = only(diagnose(net, *shown), "stale_statistics")
    assert finding.severity == "note"
    assert finding.found.endswith("predictions change, and no more of them are right.")


PREPARED = {
    "scaled to 0..1": replace(IMAGENET, mean=(0.0,) * 3, std=(1.0,) * 3),
    "left at 0..255": replace(IMAGENET, mean=(0.0,) * 3, std=(1 / 255,) * 3),
    "scaled to -1..1 (mean and std 0.5)": HALF,
    "as they are, but in BGR order": replace(IMAGENET, channels="BGR"),
    "left at 0..255 minus Caffe's mean, in BGR order": CAFFE,
}


@pytest.mark.parametrize("words", PREPARED)
def test_pictures_prepared_otherwise(subject, settling, shown, words):
    """Statistics of pictures prepared in another way than the network says."""
    record = PREPARED[words].at(SIDE)
    settled(subject, settling[0], record)
    found = diagnose(subject, shown[0])
    assert kinds(found)[0] == "preprocessing"
    finding = only(found, "preprocessing")
    assert finding.severity == "fault"
    assert f"are those of pictures {words}:" in finding.found
    assert any(each.what == "stale statistics" for each in found.unchecked)
    subject.preprocess, before = hypotheses(subject.preprocess)[words], subject.preprocess  # the mend that it names
    try:
        assert (subject.preprocess.mean, subject.preprocess.channels) == (record.mean, record.channels)
        assert diagnose(subject, shown[0]).healthy
        assert f"channels={record.channels!r}" in finding.mend
    finally:
        subject.preprocess = before


def test_ours_where_the_others_were_meant(settling, shown):
    """The other way round: made for ImageNet's mean and std, and said to take pictures as 0..255 in BGR."""
    net = settled(made(shrunk("resnet50d"), CAFFE), settling[0], IMAGENET.at(SIDE))
    finding = only(diagnose(net, *shown), "preprocessing")
    assert "are those of pictures normalised by ImageNet's mean and std, in RGB order" in finding.found


def test_grey_pictures(settling, shown):
    record = replace(IMAGENET, channels="L", mean=(0.5,), std=(0.25,)).at(SIDE)
    net = made(shrunk("resnet26", in_channels=1), record)
    grey, other = settling[0][:, :1], shown[0][:, :1]
    assert diagnose(settled(net, grey), other, shown[1]).healthy
    settled(net, grey, replace(record, mean=(0.0,), std=(1 / 255,)))
    assert "pictures left at 0..255:" in only(diagnose(net, other, shown[1]), "preprocessing").found


@pytest.mark.parametrize("name", STRIDED)
@pytest.mark.parametrize("place", ["conv1", "conv2"])
def test_stride_on_the_wrong_convolution(settling, shown, name, place):
    """The same keys and shapes, with the statistics of the network that strides at the other place."""
    other = "conv2" if place == "conv1" else "conv1"
    right = settled(made(shrunk(name, stride_at=place)), settling[0])
    wrong = made(shrunk(name, stride_at=other))
    wrong.load_state_dict(right.state_dict())
    found = diagnose(wrong, shown[0])
    assert kinds(found) == ["stride_place"]
    finding = only(found, "stride_place")
    assert finding.severity == "fault"
    assert finding.where.startswith("layer2.0")
    assert f"stride_at={place!r}" in finding.mend
    assert diagnose(right, shown[0]).healthy


@pytest.mark.parametrize("name", ["resnet26", "resnet50d", "seresnet50", "resnetv2_50"])
def test_a_strip_cut_to_a_thirty_second(settling, shown, name):
    spec = shrunk(name)
    spec = replace(spec, stages=tuple(replace(stage, mid=stage.out // 32) for stage in spec.stages))
    found = diagnose(settled(made(spec), settling[0]), *shown)
    assert kinds(found) == ["narrow_strip"] * 4
    assert {each.where for each in found.findings if each.kind == "narrow_strip"} == {f"layer{n}" for n in range(1, 5)}
    finding = found.findings[0]
    assert "The strip is narrow: mid 1 is under 1/8 of the outer 32" in finding.found
    assert "of its dimensions are in use (effective rank)" in finding.found
    assert finding.mend == "Mid 4 or more is usual."


def test_a_strip_as_wide_as_its_lands(settling, shown):
    spec = shrunk("resnet26")
    spec = replace(spec, stages=tuple(replace(stage, mid=2 * stage.out) for stage in spec.stages))
    found = diagnose(made(spec), shown[0][:16])
    assert kinds(found).count("wide_strip") == 4
    assert "The strip saves nothing: mid 64 costs" in next(
        each.found for each in found.findings if each.kind == "wide_strip"
    )


def test_numbers_that_are_none(subject, shown):
    with torch.no_grad():
        subject.layer2[0].conv2.weight[0, 0, 0, 0] = float("nan")
    found = diagnose(subject, shown[0])
    assert kinds(found) == ["not_finite"]
    assert only(found, "not_finite").where == "layer2.0.conv2.weight"
    assert found.blocks == found.norms == ()
    assert found.unchecked[-1].what == "everything else"


def test_maps_that_grow_beyond_all_numbers(settling, shown):
    net = settled(made(shrunk("resnet26", norm="none")), settling[0])
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                module.weight *= 1e6
    assert "gives some that are none" in only(diagnose(net, *shown), "not_finite").found


def test_norms_without_statistics(settling, shown):
    net = settled(made(shrunk("resnet26")), settling[0])
    for norm in list(norms(net).values())[:2]:
        norm.register_buffer("running_mean", None)
        norm.register_buffer("running_var", None)
    found = diagnose(net, *shown)
    assert kinds(found) == ["no_statistics"]
    assert only(found, "no_statistics").found.startswith("2 batch norms keep no running statistics")


def test_many_blocks_without_shortcuts(settling, shown):
    spec = shrunk("plain20_cifar")
    deep = replace(spec, stages=tuple(replace(stage, depth=6, mid=4, out=4) for stage in spec.stages))
    net = settled(made(deep), settling[0])
    finding = only(diagnose(net, *shown), "missing_shortcut")
    assert (finding.severity, finding.where) == ("note", "layer1.0 to layer3.5")
    assert finding.found.startswith("18 blocks in a row have no shortcut")


def test_a_rate_far_too_high(settling, shown):
    net = settled(made(shrunk("resnet26")), settling[0])
    found = diagnose(net, *shown, make_optimizer=lambda net: torch.optim.SGD(net.parameters(), lr=1e3))
    assert kinds(found) == ["large_updates"]
    found = diagnose(net, *shown, make_optimizer=lambda net: torch.optim.SGD(net.parameters(), lr=1e-12))
    assert kinds(found) == ["small_updates"]


def test_a_rate_beyond_all_numbers(settling, shown):
    """The loss of the second step is no number; what was found is JSON all the same."""
    net = settled(made(shrunk("resnet26")), settling[0])
    found = diagnose(net, *shown, make_optimizer=lambda net: torch.optim.SGD(net.parameters(), lr=1e30))
    assert kinds(found) == ["no_gradient"]
    assert only(found, "no_gradient").mend.startswith("Lower the rate")
    document = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert document["blocks"][0]["gradient"] == {"mean": None, "deviation": None}


@pytest.mark.long
def test_at_full_width(photos):
    """ResNet-50 as it is, healthy, with its stride misplaced, and with pictures prepared otherwise."""
    settling, shown = crops(photos, 64, seed=1, side=96)[0], crops(photos, 32, seed=2, side=96)[0]
    net, other = made(variant("resnet50")), made(variant("resnet50_v1"))
    net.preprocess = other.preprocess = IMAGENET.at(96)
    assert diagnose(settled(net, settling), shown).healthy
    other.load_state_dict(net.state_dict())
    finding = only(diagnose(other, shown), "stride_place")
    assert finding.mend == "Load the weights into the other network: isthmus.load(path, arch='resnet50')."
    net.preprocess = HALF.at(96)
    assert kinds(diagnose(net, shown)) == ["preprocessing"]
