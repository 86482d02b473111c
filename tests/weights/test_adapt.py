"""Other input channels and new classifiers."""

import pytest
import torch
from timm.models import adapt_input_conv

from isthmus.arch.preprocess import IMAGENET, Preprocess
from isthmus.weights.adapt import adapt_input, adapt_preprocess


@pytest.mark.parametrize("old", [1, 3, 4])
@pytest.mark.parametrize("new", range(1, 9))
def test_a_grey_picture_gives_the_same_response(old, new):
    weight = torch.randn(8, old, 7, 7, dtype=torch.float64)
    adapted = adapt_input(weight, new)
    assert adapted.shape == (8, new, 7, 7)
    torch.testing.assert_close(adapted.sum(1), weight.sum(1))


@pytest.mark.parametrize("new", [1, 3, 6, 9])
def test_as_timm_where_the_meaning_is_the_same(new):
    weight = torch.randn(8, 3, 7, 7)
    torch.testing.assert_close(adapt_input(weight, new), adapt_input_conv(new, weight))


def test_signals_and_volumes():
    assert adapt_input(torch.randn(8, 3, 7), 5).shape == (8, 5, 7)
    assert adapt_input(torch.randn(8, 3, 7, 7, 7), 2).shape == (8, 2, 7, 7, 7)


def test_preprocessing_follows():
    grey = adapt_preprocess(IMAGENET, 1)
    assert grey is not None
    assert (grey.channels, grey.mean, grey.resize) == ("L", (pytest.approx(0.449, abs=1e-3),), IMAGENET.resize)
    colour = adapt_preprocess(Preprocess(channels="L", mean=(0.5,), std=(0.2,)), 3)
    assert colour is not None
    assert (colour.channels, colour.mean) == ("RGB", (0.5, 0.5, 0.5))
    assert adapt_preprocess(IMAGENET, 3) is IMAGENET
    assert adapt_preprocess(IMAGENET, 5) is None
