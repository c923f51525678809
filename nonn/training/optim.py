"""Optimizers of the networks, and their learning rate: SGD, and Muon for the filters of convolutions.

The steps of Muon move all directions of a filter bank alike. After https://kellerjordan.github.io/posts/muon and
airbench94_muon of https://github.com/KellerJordan/cifar10-airbench. PyTorch's own `torch.optim.Muon` takes matrices
only, and does not hold the norm of the weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from nonn.core.numerics import is_portable
from nonn.core.training_params import ScheduleParams


class WithoutDynamo(torch.optim.Optimizer):
    """Optimizer that does not import ``torch._dynamo``, which takes as many seconds as a small training.

    PyTorch's optimizers import it to exclude themselves from compilation, and nothing is compiled here.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)


class SGD(WithoutDynamo, torch.optim.SGD):
    step = torch.no_grad()(inspect.unwrap(torch.optim.SGD.step))


class Adam(WithoutDynamo, torch.optim.Adam):
    step = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))


def learning_rate(step: int, n_steps: int, peak: float, warmup: float) -> float:
    """Triangular: rises linearly to `peak` for the share `warmup` of the steps, then falls to zero."""
    rise = warmup * n_steps
    if step < rise:
        return peak * (step + 1) / (rise + 1)
    return peak * (n_steps - step) / (n_steps - rise)


def make_optimizers(model: nn.Module, schedule: ScheduleParams) -> list[torch.optim.Optimizer]:
    """SGD with Nesterov momentum, and Muon for the filters of convolutions if the schedule has it.

    Biases and batch norm are not decayed.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    by_muon = [p for p in trained if p.ndim == 4 and schedule.muon]
    decayed = [p for p in trained if p.ndim == 2 or (p.ndim == 4 and not schedule.muon)]
    plain = [p for p in trained if p.ndim <= 1]
    sgd = SGD(
        [{"params": decayed, "weight_decay": schedule.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=schedule.lr,
        momentum=schedule.momentum,
        nesterov=schedule.momentum > 0,
    )
    return [sgd, Muon(by_muon, schedule.muon.lr, schedule.muon.momentum)] if schedule.muon else [sgd]


#: Coefficients of the quintic iteration: steepest at zero, so three iterations are enough.
QUINTIC = (3.4445, -4.7750, 2.0315)
ITERATIONS = 3


def orthogonalize(matrix: Tensor) -> Tensor:
    """About U·Vᵀ of a matrix U·S·Vᵀ: all singular values are brought near one, roughly 0.5 to 1.5.

    Newton–Schulz iterations, in bfloat16, whose error is far below that spread, unless `numerics` is ``portable``; the
    result has the matrix's dtype. Small singular values, under about a hundredth of the Frobenius
    norm, remain small.
    """
    a, b, c = QUINTIC
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if is_tall else matrix).to(matrix.dtype if is_portable() else torch.bfloat16)
    x = x / (x.norm() + 1e-7)  # the largest singular value is at most one, or it would diverge
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if is_tall else x).to(matrix.dtype)


class Muon(WithoutDynamo):
    """Steps along the orthogonalized Nesterov momentum of each filter bank, whose norm is held.

    With W a bank of n filters (outputs, inputs, height, width) as a matrix of n rows, G its gradient, M the momentum,

        M ← μ·M + G,    W ← √n · W / ‖W‖ − lr · orthogonalize(G + μ·M).

    A batch norm follows each convolution and undoes any scale of W: the norm only decides how far a step turns the
    filters. Holding it makes `lr` the share of W that a step replaces, in place of weight decay.
    """

    def __init__(self, filters: Iterable[nn.Parameter], lr: float, momentum: float):
        super().__init__(filters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure
        for group in self.param_groups:
            for weight in group["params"]:
                state, gradient = self.state[weight], weight.grad
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(gradient)
                momentum = state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
                direction = gradient.add(momentum, alpha=group["momentum"]).flatten(1)
                weight.mul_(len(weight) ** 0.5 / weight.norm())
                turned, rate = orthogonalize(direction).view_as(weight), group["lr"]
                if isinstance(rate, Tensor):  # of a recorded step
                    weight.sub_(turned * rate)
                else:
                    weight.add_(turned, alpha=-rate)
