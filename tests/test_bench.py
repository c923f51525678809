"""The bench of distillation: it trains as the stage does, and its sums are right. No time is asserted."""

import math

import pytest
import torch

from nonn.commands.bench import DistillTimes, TaughtLive, random_images, time_distill
from nonn.core.params import Architecture
from nonn.teachers.signals import compute_signals
from nonn.training.checkpoint import Checkpoint
from nonn.training.lessons import Classroom, Lesson, distill_student
from nonn.training.networks import ConvNet

TINY = Architecture(family="fast", widths=[4, 8, 12], depth=1)
LESSON = Lesson(TINY, filters=[0, 5, 7], kd_weight=0.9, transfer_weight=10.0)


@pytest.fixture
def images():
    return random_images(n_train=20, n_validation=5, n_classes=3)


@pytest.fixture
def teacher(images) -> ConvNet:
    torch.manual_seed(1)
    return ConvNet(TINY, images.channels, images.n_classes, mean=images.mean, std=images.std)


def test_a_teacher_inside_the_step_teaches_what_it_would_have_cached(params, images, teacher, tmp_path):
    section = params.distill.model_copy(update={"epochs": 3})  # the two views, and the first again

    def train(name, classroom):
        checkpoint = Checkpoint(tmp_path / f"{name}.safetensors")
        return distill_student(classroom, LESSON, section, seed=0, checkpoint=checkpoint, label=name)[1]

    cached = train("cached", Classroom(images, compute_signals(teacher, images, params.signals), params.signals))
    live = train("live", TaughtLive(images, teacher, params.signals))
    assert live["train_loss"].tolist() == pytest.approx(cached["train_loss"].tolist(), rel=1e-2)
    untaught = {
        name: torch.zeros_like(signal) for name, signal in compute_signals(teacher, images, params.signals).items()
    }
    other = train("untaught", Classroom(images, untaught, params.signals))
    assert other["train_loss"].tolist() != pytest.approx(cached["train_loss"].tolist(), rel=1e-2)


def test_every_time_of_the_bench_is_measured(params, images, teacher):
    times = time_distill(teacher, LESSON, images, params.distill, params.signals, repeats=1)
    assert all(seconds > 0 and math.isfinite(seconds) for seconds in vars(times).values())


def test_when_the_cache_has_paid_for_itself_by_hand():
    times = DistillTimes(cached=0.5, live=2.5, signals=1.0)
    assert times.ratio == 5
    assert times.epochs_to_pay(views=8) == 4  # 8 views of 1 s, and every epoch saves 2 s
