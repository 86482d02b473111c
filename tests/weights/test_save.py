"""Saving: what is written, in which format, and what is refused before anything is written."""

import math

import pytest
import torch

from isthmus.errors import WeightsError
from isthmus.weights.save import save_weights
from small_runs import network


def circle():
    inner = {}
    inner["itself"] = inner
    return inner


@pytest.mark.parametrize(
    "value",
    [torch.ones(2), {1, 2}, object(), b"bytes", math.nan, -math.inf, circle(), {("a", "b"): 1}],
    ids=["tensor", "set", "object", "bytes", "nan", "infinite", "circle", "key"],
)
def test_extra_that_is_no_json_is_refused_before_anything_is_written(tmp_path, value):
    with pytest.raises(WeightsError, match="extra cannot be saved.*plain JSON"):
        save_weights(network(), tmp_path / "a.safetensors", extra={"value": value})
    assert list(tmp_path.iterdir()) == []
