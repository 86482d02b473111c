"""Values that are no numbers are found where they are made; errors of memory are told from others."""

import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from isthmus.nn.memory import save_memory
from isthmus.train.recipe import Recipe
from isthmus.train.watch import Watch, first_not_finite, memory_explained, memory_in_use, not_finite, out_of_memory
from small_runs import network, same

CONVOLUTIONS = [name for name, module in network().named_modules() if isinstance(module, nn.Conv2d)]
BLOCKS = ("layer1.0", "layer2.0")


class NanBackward(torch.autograd.Function):
    """The identity, whose gradient is wrong in one place."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        gradient.view(-1)[3] = math.nan
        return gradient


def losses(net, parts=2):
    """The summed losses of eight made-up pictures in so many micro-batches, each computed when it is asked for."""
    random = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, 32, 32, generator=random)
    labels = torch.arange(8) % net.spec.num_classes
    for x, y in zip(images.chunk(parts), labels.chunk(parts), strict=True):
        yield F.cross_entropy(net(x), y, reduction="sum")


def test_a_sound_network_has_none():
    net = network().train()
    weights = {name: value.detach().clone() for name, value in net.named_parameters()}
    assert first_not_finite(net, losses(net))[0] == ""
    assert same(weights, dict(net.named_parameters()))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_that_overflows_is_named(name):
    net = network().train()
    with torch.no_grad():
        net.get_submodule(name).weight.fill_(3e38)
    net(torch.zeros(2, 3, 32, 32) + 1)  # the statistics behind it are no numbers either, as after the step itself
    assert first_not_finite(net, losses(net))[0] == f"in the output of {name}"


@pytest.mark.parametrize("mode", ["plain", "checkpoint", "recompute"])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_whose_gradient_is_wrong_is_named(name, mode):
    net = network().train()
    save_memory(net, mode)
    block = net.get_submodule(name)
    block.bn2.register_forward_hook(lambda module, inputs, output: NanBackward.apply(output))
    found, _ = first_not_finite(net, losses(net))
    assert found == f"in the gradient that comes out of {name}"
    # torch's own way, which runs every backward function under watch, agrees that it is in the backward pass.
    with (
        pytest.warns(UserWarning, match=r"Anomaly|Error detected"),
        torch.autograd.detect_anomaly(),
        pytest.raises(RuntimeError, match=r"NanBackward|returned nan"),
    ):
        next(losses(net)).backward()


def test_the_gradient_of_one_weight_alone():
    net = network().train()
    net.layer2[0].conv2.weight.register_hook(lambda gradient: gradient / 0)
    assert first_not_finite(net, losses(net))[0] == "in the gradient of layer2.0.conv2.weight"


def test_pictures_weights_and_the_loss_itself():
    net = network().train()
    wrong = torch.full((2, 3, 32, 32), math.nan)
    assert first_not_finite(net, (net(wrong).sum() for _ in range(1))) == ("in the input of the network", 0)
    assert first_not_finite(net, (loss / 0 for loss in losses(net)))[0] == "in the loss, of logits that are finite"
    endless = (net(torch.ones(2, 3, 32, 32)).sub(net(torch.ones(2, 3, 32, 32))).sqrt().sum() for _ in range(1))
    assert first_not_finite(net, endless)[0] == "in the gradient that comes out of the loss"
    with torch.no_grad():
        net.layer1[0].conv1.weight[0] = math.nan
    assert first_not_finite(net, losses(net))[0] == "in the weights before this step: layer1.0.conv1.weight"


def test_a_watch_sees_the_loss_and_the_first_gradient():
    net, watch = network().train(), Watch(torch.device("cpu"))
    loss = next(losses(net))
    watch.take(loss)
    loss.backward()
    assert watch.fine(net)
    assert watch.loss() == loss.item()
    watch.take(loss * math.inf)
    assert not watch.fine(net)
    watch.take(loss)
    net.fc.requires_grad_(False)
    net.layer2[0].bn3.register_forward_hook(lambda module, inputs, output: NanBackward.apply(output))
    loss = next(losses(net))
    loss.backward()
    assert not watch.fine(net)  # one wrong number in the last stage has spread to the first convolution
    assert Watch(torch.device("cpu"), gradients=False).fine(net)


def test_the_error_says_what_a_person_needs():
    names = [f"cat/{number}.jpg" for number in range(32)]
    state = Path("runs/1/checkpoints/step-000000020.pt")
    found = [  # as processes see it whose batch norms are synchronised
        ("", 50, ["healthy.jpg"]),
        ("in the output of layer2.0.bn3", 9, ["infected.jpg"]),
        ("in the output of layer2.0.conv3", 8, names),
    ]
    text = str(not_finite(found, loss=math.nan, epoch=3, step=7, lr=0.12345, checkpoint=state))
    for part in (
        "the loss is nan in step 7 of epoch 3",
        "layer2.0.conv3",
        "cat/0.jpg, cat/1.jpg",
        "and 24 more",
        "--lr (now 0.123)",
        "step-000000020.pt",
    ):
        assert part in text
    quiet = not_finite([("", 50, ["a.jpg"])], loss=2.0, epoch=1, step=1, lr=1.0, checkpoint=None)
    assert "the gradients are not finite in step 1 of epoch 1" in str(quiet)
    assert "no state was saved before it" in str(quiet)


def caught(call) -> Exception:
    with pytest.raises(Exception) as raised:  # noqa: PT011 - whatever it is
        call()
    return raised.value


def test_errors_of_memory_are_told_from_others():
    assert out_of_memory(caught(partial(torch.empty, 10**15)))
    assert out_of_memory(caught(partial(bytearray, 10**15)))
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert not out_of_memory(caught(lambda: torch.ones(2) + torch.ones(3)))
    assert not out_of_memory(OSError("not enough memory"))


def test_memory_in_use_is_that_of_the_process():
    held = torch.ones(50_000_000)
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    after = memory_in_use(torch.device("cpu"))
    assert after == pytest.approx(peak, rel=0.05)
    assert after > held.nbytes


def test_other_errors_pass(here):
    recipe = Recipe(data="pictures", weights="w", freeze="none")
    with pytest.raises(RuntimeError, match="size of tensor"), memory_explained(network(), recipe, here, "fp32", 1):
        torch.ones(2) + torch.ones(3)


SHORT = """
import json, resource, sys
import torch
import isthmus
from isthmus.errors import RunError
from isthmus.nn.memory import save_memory
from isthmus.runtime import machine
from isthmus.train.recipe import Recipe, override
from isthmus.train.watch import memory_explained

torch.set_num_threads(1)
torch.backends.mkldnn.enabled = False  # which maps memory for code of its own, after every failure again
recipe = Recipe(data="pictures", arch="resnet10t", freeze="none", batch_size=128)
net = isthmus.create("resnet10t", num_classes=2).train()
net.preprocess = net.preprocess.at(64)

def train(recipe):
    save_memory(net, recipe.memory)
    with memory_explained(net, recipe, machine("cpu"), "fp32", 1):
        for images in torch.zeros(recipe.batch_size, 3, 64, 64).split(recipe.micro_batch or recipe.batch_size):
            net(images).sum().backward()

train(override(recipe, ("batch_size=2",)))
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + 120_000_000, resource.RLIM_INFINITY))
settings, told = (), []
for attempt in range(9):
    try:
        train(override(recipe, settings))
        break
    except RunError as error:
        told.append(str(error))
        settings = tuple(told[-1].split("try ")[1].split(",")[0].split(";")[0].replace("--set ", "").split())
print(json.dumps([told, settings]))
"""


def test_advice_on_memory_comes_to_what_fits():
    """A real process that may hold 120 MB more: what it is told to try fits in the end."""
    found = subprocess.run([sys.executable, "-c", SHORT], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    told, settings = json.loads(found.stdout)
    assert "cpu has no memory left for 128 pictures at once" in told[0]
    assert told[0].endswith(
        "; try --set micro_batch=64, or try --set memory=recompute, or try --set memory=checkpoint; "
        "what was saved last is whole"
    )
    assert int(settings[0].removeprefix("micro_batch=")) <= 64
