"""Figures: colours that everybody can see on either page, and SVG that several of which can stand in one page."""

import re
from itertools import combinations
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from isthmus.errors import RunError
from isthmus.report.drawing import DARK, DASHES, LIGHT, MARKERS, SERIES, chart, inline, save, styled

SVG = "{http://www.w3.org/2000/svg}"


def linear(colour: str) -> np.ndarray:
    """Linear RGB of a hex colour (IEC 61966-2-1)."""
    values = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    """The contrast ratio of WCAG 2.2."""
    low, high = sorted(float(linear(each) @ (0.2126, 0.7152, 0.0722)) for each in (one, other))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("page", [LIGHT, DARK], ids=["light", "dark"])
def test_every_colour_is_seen_on_both_pages(page):
    assert min(contrast(colour, page["page"]) for colour in SERIES) >= 3
    assert min(contrast(page[name], page["page"]) for name in ("ink", "muted")) >= 4.5


def test_colours_are_told_apart_by_name_dash_and_marker():
    assert len(set(LIGHT.values())) == len(LIGHT) == len(DARK)
    assert len(SERIES) == len(set(DASHES)) == len(set(MARKERS))


# Machado, Oliveira & Fernandes 2009, severity 1.0, on linear RGB.
BLIND = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB of linear RGB under D65."""
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ rgb.clip(0, 1)
    x, y, z = np.cbrt(xyz / (0.9505, 1.0, 1.089))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("kind", BLIND)
def test_the_first_three_colours_differ_for_the_colour_blind(kind):
    """By 10 units of CIELAB or more; a just noticeable difference is 2.3. Further ones have dashes and markers too."""
    seen = [lab(np.array(BLIND[kind]) @ linear(colour)) for colour in SERIES[:3]]
    assert min(np.linalg.norm(one - other) for one, other in combinations(seen, 2)) >= 10


@styled()
def drawn(label: str = "a $ and <b>"):
    figure, axes = chart()
    axes.plot([0, 1], [0, 2], label=label)
    axes.set_xlabel(label)
    figure.legend(loc="outside upper left")
    return figure


def test_an_svg_for_a_page():
    text = inline(drawn(), 'what it "shows" & <b>')
    root = ET.fromstring(text)
    assert root.tag == f"{SVG}svg"
    assert root.get("role") == "img"
    assert root.get("aria-label") == 'what it "shows" & <b>'
    words = [each.text for each in root.iter(f"{SVG}text")]
    assert words.count("a $ and <b>") == 2
    assert root.find(f".//{SVG}metadata") is None
    assert root.find(f".//{SVG}style") is None
    for name in ("blue", "grid", "ink"):
        assert f"var(--{name}, {LIGHT[name]})" in text
    assert not re.search(r"(?<!, )#(?:" + "|".join(value[1:] for value in LIGHT.values()) + r")\b", text)
    assert "DejaVu" not in text


def test_equal_figures_are_equal_texts():
    assert inline(drawn(), "one") == inline(drawn(), "one")


def test_ids_of_several_figures_do_not_meet():
    texts = [inline(drawn(label), label) for label in ("one", "other", "third")]
    ids = [re.findall(r' id="([^"]+)"', text) for text in texts]
    assert all(ids)
    assert all(not set(one) & set(other) for one, other in combinations(ids, 2))
    for text, own in zip(texts, ids, strict=True):
        used = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text)
        assert {one or other for one, other in used} == set(own)


def test_names_in_other_scripts_and_hostile_ones():
    for name in ("猫", 'x" onload="alert(1)', "--> <script>", "$\\frac$", "#3080d0"):
        root = ET.fromstring(inline(drawn(name), name))
        assert [each.text for each in root.iter(f"{SVG}text")].count(name) == 2


def test_files_that_stand_alone(tmp_path):
    save(drawn(), tmp_path / "figure.svg")
    save(drawn(), tmp_path / "again.svg")
    assert (tmp_path / "figure.svg").read_bytes() == (tmp_path / "again.svg").read_bytes()
    save(drawn(), tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as image:
        assert image.size == (800, 540)
        assert image.convert("RGB").getpixel((1, 1)) == (255, 255, 255)
    with pytest.raises(RunError, match=r"must end in \.svg or \.png"):
        save(drawn(), tmp_path / "figure.gif")
