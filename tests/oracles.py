"""Foreign networks as oracles: built without cost, filled with random numbers, and compared.

Both networks are built on the meta device and then share one random state in fp64, so that even a network of
500 million parameters is held once.
"""

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace

import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from isthmus.arch.cost import cost
from isthmus.arch.plan import plan
from isthmus.arch.spec import NetSpec
from isthmus.nn.network import ResNet

Size = int | tuple[int, ...]


def random_state(module: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """A random value in fp64 for every parameter and buffer of `module`'s state dict, none of them special.

    Norm weights 0.5-1, means ±0.1, variances 0.5-1.5, biases ±0.1; other weights keep the scale of a signal
    (variance 1 / fan in), so that no sigmoid saturates and every block counts.
    """
    random = torch.Generator().manual_seed(seed)
    norms = {
        name
        for name, child in module.named_modules()
        if isinstance(child, nn.modules.batchnorm._NormBase | nn.GroupNorm)
    }
    state = {}
    for key, value in module.state_dict().items():
        parent, _, leaf = key.rpartition(".")
        if not value.is_floating_point():
            state[key] = torch.randint(1, 1000, value.shape, generator=random)
            continue
        fan = math.sqrt(3 / max(value[0].numel(), 1)) if value.ndim > 1 else 0.1
        low, high = {
            "running_mean": (-0.1, 0.1),
            "running_var": (0.5, 1.5),
            "weight": (0.5, 1.0) if parent in norms else (-fan, fan),
            "bias": (-0.1, 0.1),
        }[leaf]
        state[key] = torch.empty(value.shape, dtype=torch.float64).uniform_(low, high, generator=random)
    return state


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """`module` in fp64 and in evaluation, every parameter and buffer random."""
    module.load_state_dict(random_state(module, seed), assign=True)
    return module.double().eval().requires_grad_(requires_grad=False)


def bare(make: Callable[[], nn.Module]) -> nn.Module:
    """`make()` on the meta device; on the CPU where a buffer outside the state dict has a value of its own (blur)."""
    with torch.device("meta"):
        module = make()
    known = module.state_dict()
    return module if all(name in known for name, _ in module.named_buffers()) else make()


def trimmed(spec: NetSpec, *, later: int = 2) -> tuple[NetSpec, dict[str, tuple[int, ...]]]:
    """At most two blocks a stage, the striding one and one that repeats: our spec, and the option for timm.

    `later` is the most after the first stage.
    """
    most = (2, *(later,) * (len(spec.stages) - 1))
    stages = tuple(
        replace(stage, depth=min(stage.depth, count)) for stage, count in zip(spec.stages, most, strict=True)
    )
    return replace(spec, stages=stages), {"layers": tuple(stage.depth for stage in stages)}


def small(spec: NetSpec) -> NetSpec:
    """Two blocks in the first stage and one in the others, half as wide: for libraries that take widths."""
    stages = trimmed(spec, later=1)[0].stages
    return replace(spec, stages=tuple(replace(stage, mid=stage.mid // 2, out=stage.out // 2) for stage in stages))


def ours(spec: NetSpec | str, size: Size, state: Mapping[str, Tensor]) -> ResNet:
    """Our network holding `state`, strictly, in fp64 and in evaluation."""
    net = bare(lambda: ResNet(plan(spec, size)))
    net.load_state_dict(state, assign=True)
    assert isinstance(net, ResNet)
    return net.double().eval().requires_grad_(requires_grad=False)


def timm_net(name: str, **options: object) -> nn.Module:
    """The network of that name in timm, on the meta device where that is possible."""
    return bare(lambda: timm.create_model(name, **options))


def picture(*shape: int, seed: int = 1) -> Tensor:
    """Random input in fp64."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest wanted value."""
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    return float(((found - wanted).abs().max() / wanted.abs().max()).detach())


def seed_of(name: str) -> int:
    """A seed that is the same in every process."""
    return zlib.crc32(name.encode())


def traced(net: nn.Module, shape: tuple[int, ...]) -> tuple[dict[str, tuple[int, ...]], int]:
    """Output shape (C, *size) of every module by name, and torch's own count of FLOPs, for one input (C, *size)."""
    shapes: dict[str, tuple[int, ...]] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda _module, _inputs, output: shapes.update({name: tuple(output.shape[1:])})

    handles = [module.register_forward_hook(note(name)) for name, module in net.named_modules() if name]
    first = next(net.parameters())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(torch.empty(1, *shape, device=first.device, dtype=first.dtype))
    for handle in handles:
        handle.remove()
    return shapes, counter.get_total_flops()


def saved_bytes(net: nn.Module, x: Tensor) -> int:
    """Bytes that wait for backward after `net(x)`, each storage once, without parameters and buffers."""
    held = {tensor.untyped_storage().data_ptr() for tensor in (*net.parameters(), *net.buffers())}
    saved: dict[int, Tensor] = {}  # holding them, so that no storage is freed and its place taken by another

    def keep(tensor: Tensor) -> Tensor:
        saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        net(x)
    return sum(tensor.untyped_storage().nbytes() for place, tensor in saved.items() if place not in held)


def assert_plan_is_true(net: ResNet) -> None:
    """Parameters, MACs and every map of the plan against the network itself."""
    found = cost(net.plan)
    shapes, flops = traced(net, (net.spec.in_channels, *net.plan.image_size))
    assert found.params == sum(parameter.numel() for parameter in net.parameters())
    assert found.flops == flops
    for row in found.rows:
        if row.name in shapes and ".se." not in row.name and not row.name.startswith("fc"):
            assert shapes[row.name] == (row.out_channels, *row.out_size), row
    modules = set(shapes) | {"pool"}  # the head's pool is no module of its own
    assert {row.name for row in found.rows if row.params} <= modules
    for block in net.plan.blocks:
        assert shapes[block.name] == (block.spec.out_channels, *block.out_size), block.name
    with torch.no_grad():
        maps = net.features(
            torch.empty(1, net.spec.in_channels, *net.plan.image_size, device=next(net.parameters()).device)
        )
    assert list(maps) == [feature.name for feature in net.plan.features]
    for feature, found_map in zip(net.plan.features, maps.values(), strict=True):
        assert tuple(found_map.shape[1:]) == (feature.channels, *feature.size), feature
        if net.spec.stem.pool != "max_ceil" and net.spec.anti_alias != "avg":  # their stem pools round down
            assert feature.size == tuple(-(-side // feature.stride) for side in net.plan.image_size)
