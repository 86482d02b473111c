"""Networks made of the bottleneck residual block: on paper, in torch, from any weights, to predictions.

Importing this package loads no torch; the names that need it load it when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from isthmus.arch.cost import Cost, cost
from isthmus.arch.plan import Plan, plan
from isthmus.arch.preprocess import Preprocess
from isthmus.arch.spec import HeadSpec, NetSpec, StageSpec, StemSpec
from isthmus.arch.variants import variant, variants
from isthmus.errors import IsthmusError

if TYPE_CHECKING:
    from isthmus.deploy.export import export
    from isthmus.deploy.predictor import Predictor
    from isthmus.diagnose.findings import Diagnosis
    from isthmus.examine import diagnosis
    from isthmus.nn.batchnorm import precise_batchnorm
    from isthmus.nn.block import BasicBlock, BottleneckBlock, PreActBottleneckBlock, projection
    from isthmus.nn.fold import fold
    from isthmus.nn.freeze import freeze
    from isthmus.nn.network import ResNet
    from isthmus.run import evaluate, fit
    from isthmus.ship import predict, predict_table, quantize
    from isthmus.train.recipe import Recipe
    from isthmus.weights.fit import LoadReport
    from isthmus.weights.load import create, load, load_weights
    from isthmus.weights.save import save_weights

LAZY = {
    "BasicBlock": "isthmus.nn.block",
    "BottleneckBlock": "isthmus.nn.block",
    "PreActBottleneckBlock": "isthmus.nn.block",
    "projection": "isthmus.nn.block",
    "precise_batchnorm": "isthmus.nn.batchnorm",
    "ResNet": "isthmus.nn.network",
    "fold": "isthmus.nn.fold",
    "freeze": "isthmus.nn.freeze",
    "LoadReport": "isthmus.weights.fit",
    "create": "isthmus.weights.load",
    "load": "isthmus.weights.load",
    "load_weights": "isthmus.weights.load",
    "save_weights": "isthmus.weights.save",
    "Recipe": "isthmus.train.recipe",
    "Diagnosis": "isthmus.diagnose.findings",
    "diagnosis": "isthmus.examine",
    "evaluate": "isthmus.run",
    "export": "isthmus.deploy.export",
    "fit": "isthmus.run",
    "Predictor": "isthmus.deploy.predictor",
    "predict": "isthmus.ship",
    "predict_table": "isthmus.ship",
    "quantize": "isthmus.ship",
}

__all__ = [
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


def __getattr__(name: str) -> Any:
    if name not in LAZY:
        message = f"module 'isthmus' has no attribute {name!r}"
        raise AttributeError(message)
    value = getattr(import_module(LAZY[name]), name)
    globals()[name] = value  # the next use finds it without this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
