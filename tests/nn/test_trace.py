"""Tracing: equal to the plan and to other counters, and the module is as it was."""

import copy

import pytest
import timm
import torch
import torchvision
from fvcore.nn import FlopCountAnalysis
from torch import nn

from isthmus.arch.cost import cost
from isthmus.arch.plan import plan
from isthmus.nn.network import ResNet
from isthmus.nn.trace import trace_cost

NETS = ["resnet18", "resnet50", "resnet26t", "seresnet50", "ecaresnet26t", "resnetaa34d", "resnetblur18", "resnetrs50"]
NETS += ["resnetv2_50d", "resnext50_32x4d", "resnet50_gn", "test_resnet"]


def totals(rows):
    return tuple(sum(values) for values in zip(*((row.params, row.macs, row.activations) for row in rows), strict=True))


@pytest.mark.parametrize("name", NETS)
def test_equals_the_plan(name):
    net = ResNet(plan(name, 96))
    rows, found = trace_cost(net, (3, 96, 96)), cost(name, 96)
    assert totals(rows)[:2] == (found.params, found.macs)
    traced = {row.name: row for row in rows}
    for row in found.rows:
        if row.macs or row.params:
            assert (traced[row.name].params, traced[row.name].macs) == (row.params, row.macs), row.name
        if row.kind == "conv" and ".se." not in row.name:
            assert traced[row.name][2:6] == row[2:6]
            assert traced[row.name].activations == row.activations


@pytest.mark.parametrize(
    "make",
    [
        lambda: torchvision.models.get_model("resnet50", weights=None),
        lambda: torchvision.models.get_model("resnext50_32x4d", weights=None),
        lambda: torchvision.models.get_model("mobilenet_v3_small", weights=None),
        lambda: timm.create_model("resnet26d"),
        lambda: timm.create_model("convnext_atto"),
    ],
)
def test_foreign_networks_against_fvcore(make):
    net = make().eval()
    rows = trace_cost(net, (3, 96, 96))
    counter = (
        FlopCountAnalysis(net, torch.zeros(1, 3, 96, 96))
        .unsupported_ops_warnings(False)
        .uncalled_modules_warnings(False)
    )
    wanted = counter.by_operator()  # it calls a MAC a flop
    assert sum(row.macs for row in rows) == wanted["conv"] + wanted["linear"]
    assert sum(row.params for row in rows) == sum(parameter.numel() for parameter in net.parameters())


def test_own_block_with_calls_that_are_no_module():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(8))
            self.mix = nn.Conv2d(8, 8, 1)

        def forward(self, x):
            x = self.mix(self.mix(x))  # twice the work, once the parameters
            return torch.einsum("nchw,cd->ndhw", x, torch.diag(self.scale))

    rows = trace_cost(Own(), (8, 4, 4))
    assert [(row.name, row.params, row.macs) for row in rows] == [
        ("mix", 72, 8 * 8 * 16),
        ("mix", 0, 8 * 8 * 16),
        ("", 8, 8 * 8 * 16),
    ]


@pytest.mark.parametrize("training", [True, False])
def test_leaves_the_module_alone(training):
    net = ResNet(plan("resnet26d", 64)).double().train(training)
    hook = net.layer1.register_forward_hook(lambda *_: None)
    before, modes = copy.deepcopy(net.state_dict()), [module.training for module in net.modules()]
    pointers = [parameter.data_ptr() for parameter in net.parameters()]
    trace_cost(net, (3, 64, 64))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert [module.training for module in net.modules()] == modes
    assert [parameter.data_ptr() for parameter in net.parameters()] == pointers
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in net.modules()].count(1) == 1
    assert all(parameter.grad is None for parameter in net.parameters())
    hook.remove()
