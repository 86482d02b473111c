"""The name of a network that is in the table, whatever its classes, channels and drop path."""

from dataclasses import replace

import pytest

from isthmus.arch.variants import name_of, variant, variants


@pytest.mark.parametrize("name", variants())
def test_the_name_of_every_row(name):
    spec = variant(name)
    assert name_of(spec) == name
    bare = replace(spec, name="", num_classes=3, in_channels=1, drop_path=0.1)
    assert replace(variant(name_of(bare)), name="") == replace(spec, name="")


def test_what_is_no_row_has_no_name():
    spec = variant("resnet50")
    for change in (
        {"attention": "eca", "attention_ratio": 0.5},
        {"norm_eps": 3e-4},
        {"dims": 3},
        {"stages": spec.stages[:3]},
    ):
        assert name_of(replace(spec, **change)) == ""
