"""LAMB, the optimiser of large batches and of "ResNet strikes back"."""
# ruff: noqa: SLF001 - torch's own optimisers are made of these functions over lists

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Lamb"]

Groups = list[dict[str, Any]] | list[nn.Parameter]


class Lamb(torch.optim.Optimizer):
    """Adam whose step is scaled, parameter by parameter, to the norm of the weights (You et al. 2020).

    As timm's Lamb, which trained "ResNet strikes back", without the clipping in it: the bias of both averages is
    corrected, weight decay is part of the step whose norm is taken, and parameters without decay are plain Adam.
    """

    def __init__(
        self,
        params: Groups,
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every parameter that has a gradient; `closure` computes them anew and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            trained: list[Tensor] = [parameter for parameter in group["params"] if parameter.grad is not None]
            if trained:
                self._move(trained, [self._state(parameter) for parameter in trained], group)
        return loss

    def _state(self, parameter: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        state["step"] += 1
        return state

    @staticmethod
    def _move(parameters: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        means: list[Tensor] = [state["exp_avg"] for state in states]
        squares: list[Tensor] = [state["exp_avg_sq"] for state in states]
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        # Parameters that thaw later have taken fewer steps than the rest of their group.
        updates = torch._foreach_div(means, [1 - beta1 ** state["step"] for state in states])
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, [(1 - beta2 ** state["step"]) ** 0.5 for state in states])
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_div_(updates, roots)
        if group["weight_decay"]:
            torch._foreach_add_(updates, parameters, alpha=group["weight_decay"])
            weights, steps = (torch.stack(torch._foreach_norm(list(each))) for each in (parameters, updates))
            ratios = torch.where((weights > 0) & (steps > 0), weights / steps, 1.0)
            torch._foreach_mul_(updates, list(ratios.unbind()))
        torch._foreach_add_(parameters, updates, alpha=-group["lr"])
