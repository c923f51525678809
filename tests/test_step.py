"""A step of a training, and the same recorded on a GPU: rates reach the optimizers, and both learn alike."""

import pytest
import torch
import torch.nn.functional as F

from nonn.core.architecture import Architecture
from nonn.core.training_params import MuonParams, ScheduleParams
from nonn.training.networks import ConvNet, predict
from nonn.training.optim import make_optimizers
from nonn.training.step import WARM_UP, RecordedStep, Step, set_rate

STUDENT = Architecture(family="fast", widths=[4, 8, 12], depth=1)
SCHEDULE = ScheduleParams(
    epochs=1, batch_size=8, lr=0.05, momentum=0.9, weight_decay=0.01, warmup=0, muon=MuonParams(lr=0.1, momentum=0.6)
)


def losses_of(
    kind: type[Step], device: str, n_steps: int, as_tensors: bool = False, channels: int = 3, moved_at: int = -1
) -> list[float]:
    """Of a small network that learns one batch, at rates that fall from step to step.

    Before each step it is asked for predictions, and before step `moved_at` it is moved to other addresses.
    """
    torch.manual_seed(0)
    model = ConvNet(STUDENT, channels, 4, mean=torch.full((channels,), 128.0), std=torch.full((channels,), 64.0))
    model = model.to(device, memory_format=torch.channels_last)
    images = torch.randint(256, (8, channels, 16, 16), dtype=torch.uint8, device=device)
    labels = torch.arange(8, device=device) % 4
    optimizers = make_optimizers(model, SCHEDULE)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [group["lr"] for group in groups]
    if as_tensors:
        for group in groups:
            group["lr"] = torch.tensor(group["lr"])
    step = kind(model, lambda images, labels: F.cross_entropy(model(images)[1], labels), optimizers)
    found = []
    for number in range(n_steps):
        for group, peak in zip(groups, peaks, strict=True):
            set_rate(group, peak * (1 - number / n_steps))
        predict(model, images, device)
        model.train()
        if number == moved_at:
            model.cpu().to(device, memory_format=torch.channels_last)
        found.append(step(images, labels).item())
    return found


def test_rates_as_tensors_are_the_same_rates():
    numbers, tensors = losses_of(Step, "cpu", 6), losses_of(Step, "cpu", 6, as_tensors=True)
    assert tensors == pytest.approx(numbers, rel=1e-4)
    assert numbers[-1] < 0.7 * numbers[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("moved_at", [-1, WARM_UP + 4])
def test_a_recorded_step_learns_what_a_step_does(channels, moved_at):
    n, about = WARM_UP + 8, {"channels": channels, "moved_at": moved_at}
    assert losses_of(RecordedStep, "cuda", n, **about) == pytest.approx(losses_of(Step, "cuda", n, **about), rel=0.05)
