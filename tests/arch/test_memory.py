"""Bytes of training on paper against those that torch keeps: every family, every mode, fp32 and bf16."""

from dataclasses import replace

import pytest
import torch

from isthmus.arch.memory import largest_batch, training_memory
from isthmus.arch.plan import plan
from isthmus.arch.spec import HeadSpec
from isthmus.arch.variants import variant, variants
from isthmus.errors import SpecError
from isthmus.nn.memory import save_memory
from isthmus.nn.network import ResNet
from oracles import saved_bytes, trimmed

MODES = ["plain", "checkpoint", "recompute"]
# One row for whatever sets rows of the table apart; the rest, deeper or wider, runs with the long tests.
QUICK = {
    "resnet10t", "resnet50", "resnext50_32x4d", "resnet50_gn", "seresnext26d_32x4d", "ecaresnet26t", "resnetaa50d",
    "resnetblur18", "resnetrs50", "resnetv2_50t", "resnetv2_50_keras", "resnet50_keras", "resnet20_cifar",
    "plain20_cifar",
}  # fmt: skip
NAMES = [pytest.param(name, marks=[pytest.mark.long] * (name not in QUICK)) for name in variants()]


def assert_paper_is_true(spec, side, precision, batch=2):
    """Predicted bytes within 2 % of those measured, in every mode."""
    net = ResNet(plan(spec, side)).train()
    if spec.dims == 2:
        net.to(memory_format=torch.channels_last)
    x = torch.randn(batch, spec.in_channels, *(side,) * spec.dims)
    for mode in MODES:
        save_memory(net, mode)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            measured = saved_bytes(net, x)
        found = training_memory(net.plan, batch=batch, precision=precision, memory=mode)
        assert found.saved == pytest.approx(measured, rel=0.02), mode
    held = {id(each.untyped_storage()): each.nbytes for each in (*net.parameters(), *net.buffers()) if each.ndim}
    kernels = sum(each.nbytes for name, each in net.named_buffers() if name.endswith("kernel"))  # of blur filters
    assert found.weights == sum(held.values()) - kernels
    assert found.gradients == sum(each.nbytes for each in net.parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_every_family(name, precision):
    assert_paper_is_true(trimmed(variant(name), later=1)[0], 33 if "cifar" in name else 65, precision)


SPECS = {
    "drop path": replace(variant("resnet26"), drop_path=0.2),
    "SiLU": replace(variant("resnet26"), activation="silu"),
    "SiLU before": replace(variant("resnetv2_50"), activation="silu"),
    "no norm": replace(variant("resnet26"), norm="none"),
    "leading norms": replace(variant("resnetv2_50t"), norm="leading"),
    "dilated": variant("resnet26d").with_output_stride(8),
    "rich head": replace(
        variant("resnet26"), head=HeadSpec(taps=("layer3", "last"), pools=("avg", "max"), norm=True, hidden=16)
    ),
    "stem in the head": replace(variant("resnetv2_50"), head=HeadSpec(taps=("stem", "last"), pools=("max",))),
    "no classifier": replace(variant("resnet26"), num_classes=0),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", SPECS)
def test_what_specs_can_ask_for(name, precision):
    assert_paper_is_true(trimmed(SPECS[name], later=1)[0], 65, precision)


@pytest.mark.parametrize("dims", [1, 3])
def test_signals_and_volumes(dims):
    assert_paper_is_true(replace(variant("seresnet18"), dims=dims, shortcut="avg"), 33, "fp32")


def test_resnet50_at_224():
    assert_paper_is_true(variant("resnet50"), 224, "fp32", batch=1)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_states_of_optimisers_and_averages(optimizer):
    net = ResNet(plan("resnet18", 33))
    kinds = {"sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "adamw": torch.optim.AdamW}
    made = kinds[optimizer](net.parameters())
    net(torch.randn(2, 3, 33, 33)).sum().backward()
    made.step()
    states = sum(each.nbytes for state in made.state.values() for each in state.values() if each.ndim)
    found = training_memory(net.plan, batch=1, optimizer=optimizer, ema=True)
    assert found.optimizer == states
    assert found.average == found.weights


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_largest_batch_fits_and_the_next_does_not(mode, precision):
    laid_out = plan("resnet50")
    limit = 6 * 2**30
    options = {"precision": precision, "memory": mode, "optimizer": "adamw", "ema": True}
    batch = largest_batch(laid_out, limit, **options)
    assert training_memory(laid_out, batch=batch, **options).total <= limit
    assert training_memory(laid_out, batch=batch + 1, **options).total > limit
    assert largest_batch(laid_out, 2**28, **options) == 0


def test_mistakes():
    with pytest.raises(SpecError, match="batch is 0"):
        training_memory(plan("resnet18"), batch=0)
    own = replace(variant("resnet18"), stages=(replace(variant("resnet18").stages[0], block="mine"),))
    with pytest.raises(SpecError, match="own kind 'mine'"):
        training_memory(plan(own), batch=1)
