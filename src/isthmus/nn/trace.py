"""Cost of any torch module, read off a run on meta tensors: for your own blocks, and as the plan's second witness."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from isthmus.arch.cost import Row

__all__ = ["trace_cost"]


def trace_cost(module: nn.Module, input_shape: tuple[int, ...]) -> tuple[Row, ...]:
    """One row a leaf module in the order of the run, for one input of `input_shape` (C, H, W); `module` is not touched.

    MACs are half of torch's own count of FLOPs, so operations that are no module of their own are in the row of the
    module that called them. A module called twice has two rows, its parameters in the first.
    """
    copied = copy.deepcopy(module).to("meta").eval()
    counter = FlopCounterMode(display=False)
    rows: list[Row] = []
    begun: list[tuple[int, list[int]]] = []  # of each call under way: the total before it, the MACs of its children
    seen: set[int] = set()

    def shape(value: Any) -> tuple[int, ...]:
        return tuple(value.shape[1:]) if isinstance(value, Tensor) else ()

    def before(_child: nn.Module, _inputs: Any) -> None:
        begun.append((counter.get_total_flops(), []))

    def after(name: str, child: nn.Module, inputs: Any, output: Any) -> None:
        total, inner = begun.pop()
        macs = (counter.get_total_flops() - total) // 2
        if begun:
            begun[-1][1].append(macs)
        macs -= sum(inner)
        own = child.parameters() if not list(child.children()) else child.parameters(recurse=False)
        params = 0 if id(child) in seen else sum(parameter.numel() for parameter in own)
        seen.add(id(child))
        if list(child.children()) and not (macs or params):
            return
        into, out = shape(inputs[0] if inputs else None), shape(output)
        rows.append(
            Row(
                name,
                type(child).__name__,
                into[0] if into else 0,
                out[0] if out else 0,
                into[1:],
                out[1:],
                params,
                macs,
                output[0].numel() if macs and isinstance(output, Tensor) else 0,
            )
        )

    handles = []
    for name, child in copied.named_modules():
        handles.append(child.register_forward_pre_hook(before))
        handles.append(
            child.register_forward_hook(lambda child, inputs, output, name=name: after(name, child, inputs, output))
        )
    first = next((parameter.dtype for parameter in copied.parameters()), torch.get_default_dtype())
    with torch.no_grad(), counter:
        copied(torch.empty(1, *input_shape, device="meta", dtype=first))
    return tuple(rows)
