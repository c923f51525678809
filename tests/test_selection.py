"""The proxy: it selects what it finds hardest, learns of every fourth batch, and is resumed where it was."""

import copy

import pytest
import torch
import torch.nn.functional as F

from nonn.core.architecture import Architecture
from nonn.core.training_params import MuonParams, ScheduleParams
from nonn.teachers.selection import LEARNS_EVERY, Proxy
from nonn.training.networks import ConvNet

SCHEDULE = ScheduleParams(epochs=1, batch_size=8, lr=0.1, momentum=0.9, weight_decay=0.0, warmup=0.0)


def make_proxy(keep: float = 0.5, schedule: ScheduleParams = SCHEDULE) -> Proxy:
    torch.manual_seed(0)
    network = ConvNet(Architecture(family="fast", widths=[4, 8, 8], depth=1), 1, 3, std=torch.full((1,), 60.0))
    return Proxy(network, schedule, keep, label_smoothing=0.1)


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, 1, 28, 28), generator=generator, dtype=torch.uint8)
    return images, torch.randint(0, 3, (8,), generator=generator)


def weights_of(proxy: Proxy) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in proxy.network.parameters()]


@pytest.mark.parametrize(("keep", "n_kept"), [(0.5, 4), (0.25, 2), (1.0, 8), (0.01, 1)])
def test_the_images_of_the_largest_losses_are_kept_in_order(batch, keep, n_kept):
    images, labels = batch
    proxy = make_proxy(keep)
    proxy.n_batches += 1  # a batch that is only judged
    hardest = proxy.hardest(images, labels)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        losses = F.cross_entropy(proxy.network(images)[1].float(), labels, label_smoothing=0.1, reduction="none")
    assert hardest.tolist() == sorted(hardest.tolist())
    assert len(hardest) == n_kept
    others = [i for i in range(8) if i not in hardest.tolist()]
    assert not others or losses[hardest].min() > losses[others].max()


@pytest.mark.parametrize("muon", [None, MuonParams(lr=0.1, momentum=0.6)])
def test_it_learns_from_every_fourth_batch_what_it_selected(batch, muon):
    images, labels = batch
    proxy = make_proxy(schedule=SCHEDULE.model_copy(update={"muon": muon}))
    changed = []
    for _ in range(2 * LEARNS_EVERY):
        before = weights_of(proxy)
        proxy.hardest(images, labels)
        changed.append(any(not torch.equal(a, b) for a, b in zip(before, weights_of(proxy), strict=True)))
    assert changed == [True, False, False, False] * 2


def test_its_state_says_which_batch_is_next(batch):
    proxy, resumed = make_proxy(), make_proxy()
    for _ in range(LEARNS_EVERY - 1):
        proxy.hardest(*batch)
    resumed.load_state_dict(proxy.state_dict())
    for optimizer, old in zip(resumed.optimizers, proxy.optimizers, strict=True):
        optimizer.load_state_dict(copy.deepcopy(old.state_dict()))  # tensors are shared otherwise
    for _ in range(2):
        assert torch.equal(resumed.hardest(*batch), proxy.hardest(*batch))
    for a, b in zip(weights_of(resumed), weights_of(proxy), strict=True):
        assert torch.equal(a, b)
