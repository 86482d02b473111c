"""The public names, pinned: each resolves, and none comes or goes unseen."""

import inspect

import pytest

import isthmus

NAMES = [
    "BasicBlock",
    "BottleneckBlock",
    "Cost",
    "Diagnosis",
    "HeadSpec",
    "IsthmusError",
    "LoadReport",
    "NetSpec",
    "Plan",
    "PreActBottleneckBlock",
    "Predictor",
    "Preprocess",
    "Recipe",
    "ResNet",
    "StageSpec",
    "StemSpec",
    "cost",
    "create",
    "diagnosis",
    "evaluate",
    "export",
    "fit",
    "fold",
    "freeze",
    "load",
    "load_weights",
    "plan",
    "precise_batchnorm",
    "predict",
    "predict_table",
    "projection",
    "quantize",
    "save_weights",
    "variant",
    "variants",
]


def test_names():
    assert isthmus.__all__ == NAMES
    assert set(NAMES) <= set(dir(isthmus))
    assert set(isthmus.LAZY) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_name_resolves_and_says_what_it_is(name):
    value = getattr(isthmus, name)
    assert value.__name__ == name
    assert value.__module__.startswith("isthmus.")
    assert inspect.getdoc(value)
    # Each lazy name comes from where the type checker is told it comes from.
    assert isthmus.LAZY.get(name, value.__module__) == value.__module__


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="module 'isthmus' has no attribute 'resnet50'"):
        isthmus.resnet50  # noqa: B018


def test_errors_are_one_tree():
    from isthmus import errors

    for name in errors.__all__:
        assert issubclass(getattr(errors, name), errors.IsthmusError)
        assert name in (errors.__doc__ or "")
    assert isinstance(errors.MissingExtraError("onnx", "onnx"), errors.IsthmusError)
    assert 'pip install "isthmus[onnx]"' in str(errors.MissingExtraError("onnx", "onnx"))
