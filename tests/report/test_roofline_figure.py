"""The roofline figure: its points, roofs and bars against the rows that it is drawn from."""

import pytest

from isthmus.arch.plan import plan
from isthmus.arch.roofline import Bandwidth, LayerTime, Limits, merged_times, roofline
from isthmus.report.drawing import inline
from isthmus.report.roofline_figure import roofline_figure

DESK = Limits(
    machine="desk",
    threads=2,
    lanes=16,
    fp32=100e9,
    bandwidth=(Bandwidth(size=2**20, rate=80e9), Bandwidth(size=2**24, rate=8e9)),
)


def times(name):
    """Layers at half of their limit, and an engine's own work."""
    floors = roofline(plan(name, 64), DESK)
    rows = [LayerTime(floor.name, floor.kind, floor.block, 2 * floor.seconds, floor) for floor in floors]
    return [*rows, LayerTime("between the nodes", "", "engine", 1e-3, None)]


def test_points_and_roofs():
    rows = times("resnet26")
    above, _ = roofline_figure(rows, DESK, "fp32").axes
    points = {tuple(point) for each in above.collections for point in each.get_offsets().tolist()}
    wanted = {(row.floor.intensity, row.floor.operations / row.seconds / 1e9) for row in rows if row.floor}
    assert points <= wanted
    assert {point for point in wanted if point[0] > 10} <= points
    for line, rate in zip(above.lines, (80e9, 8e9), strict=True):
        for intensity, rise in zip(*line.get_data(), strict=True):
            assert rise == pytest.approx(min(intensity * rate, 100e9) / 1e9)
    assert [text.get_text() for text in above.texts] == [
        "main memory, 8 GB/s",
        "caches, 80 GB/s ",
        "100 GFLOP/s in fp32",
    ]


@pytest.mark.parametrize(("name", "level"), [("resnet26", "block"), ("resnet152", "stage")])
def test_bars(name, level):
    """By stage where a network has too many blocks to look at."""
    rows = times(name)
    blocks = merged_times(rows, level)
    _, below = roofline_figure(rows, DESK, "fp32").axes
    measured, floors = ([bar.get_width() for bar in bars] for bars in below.containers)
    assert measured == pytest.approx([1e3 * row.seconds for row in blocks])
    assert floors == pytest.approx([1e3 * row.floor.seconds if row.floor else 0 for row in blocks])
    assert [label.get_text() for label in below.get_yticklabels()] == [row.name for row in blocks]
    assert [text.get_text() for text in below.texts] == ["50%"] * (len(blocks) - 1) + [""]


def test_it_goes_into_a_page():
    assert "layer1.0" in inline(roofline_figure(times("resnet26"), DESK, "fp32"), "a roofline")
