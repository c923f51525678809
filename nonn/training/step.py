"""One step of a training: run operation by operation, or on a GPU recorded once and replayed as a whole.

A step of a student is a few hundred short operations, which a CPU launches more slowly than a GPU executes them. A CUDA
graph launches all of them at once: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

#: Steps before the recording, in which libraries choose their kernels and set up their memory.
WARM_UP = 3


def set_rate(group: dict, rate: float) -> None:
    """Set the learning rate of a group of parameters, where a recorded step finds it."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


class Step:
    """Forward, backward, and the optimizers' steps for one batch, the arguments of `loss_of`; returns the loss."""

    def __init__(
        self, model: nn.Module, loss_of: Callable[..., Tensor], optimizers: Sequence[torch.optim.Optimizer]
    ) -> None:
        self.model, self.loss_of, self.optimizers = model, loss_of, optimizers

    def __call__(self, *batch: Tensor) -> Tensor:
        loss = self.loss_of(*batch)
        self.model.zero_grad()
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.detach()


class RecordedStep(Step):
    """The same on a GPU, for batches of one shape. The optimizers' learning rates become tensors: see `set_rate`."""

    def __init__(
        self, model: nn.Module, loss_of: Callable[..., Tensor], optimizers: Sequence[torch.optim.Optimizer]
    ) -> None:
        super().__init__(model, loss_of, optimizers)
        device = next(model.parameters()).device
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = torch.tensor(float(group["lr"]), device=device)
                if isinstance(optimizer, torch.optim.SGD):
                    group["fused"], group["foreach"] = True, False  # the only one that reads a rate on the GPU
        self.graph: torch.cuda.CUDAGraph | None = None
        self.n_run, self.stream = 0, torch.cuda.Stream()

    def __call__(self, *batch: Tensor) -> Tensor:
        if self.n_run < WARM_UP:
            self.n_run += 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                loss = super().__call__(*batch)
            torch.cuda.current_stream().wait_stream(self.stream)
            return loss
        if self.graph is None or self._places() != self.places:
            self._record(batch)
        for held, new in zip(self.held, batch, strict=True):
            held.copy_(new)
        assert self.graph is not None
        self.graph.replay()
        return self.loss.clone()

    def _places(self) -> list[int]:
        """Addresses that a replay reads: a model that was moved meanwhile has to be recorded anew."""
        return [tensor.data_ptr() for tensor in (*self.model.parameters(), *self.model.buffers())]

    def _record(self, batch: Sequence[Tensor]) -> None:
        self.held = [part.clone() for part in batch]
        self.model.zero_grad(set_to_none=True)  # gradients then lie where every replay writes them
        self.places = self._places()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = super().__call__(*self.held)


def make_step(
    model: nn.Module,
    loss_of: Callable[..., Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
    device: torch.device,
) -> Step:
    return (RecordedStep if device.type == "cuda" else Step)(model, loss_of, optimizers)
