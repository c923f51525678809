"""A teacher that sees larger pictures than its students."""

import contextlib

import pytest
import torch
from experiments import write_dataset

from nonn.core.files import read_json, write_json
from nonn.core.paths import Paths
from nonn.data.dataset import load_dataset, load_teacher_dataset, measure_channels
from nonn.data.image_store import ImageWriter
from nonn.data.tensors import read_tensors
from nonn.method.exporting import export_solo
from nonn.method.scoring import score_all
from nonn.stages import signals, teacher
from nonn.stages.export import solo_models
from nonn.teachers import loading
from nonn.training.networks import predict, scaled_batch_size

PATHS = Paths("tiny")


@pytest.fixture
def larger(folder, params, data):
    """The tiny experiment up to its signals, of pictures at twice the size for the teacher, each pixel four times."""
    assert not any(folder.iterdir())
    write_dataset(data, PATHS)
    large = data.images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    PATHS.teacher_images.unlink()
    mean, std = measure_channels(large[data.train])
    with contextlib.closing(ImageWriter(PATHS.teacher_images, 56)) as writer:
        writer.begin(len(large))
        for index, image in enumerate(large.numpy()):
            writer.write(index, image)
        writer.finish(torch.arange(len(large)).numpy(), 1, {"mean": mean, "std": std})
    section = params.teacher.model_copy(update={"size": 56, "epochs": 2})
    params = params.model_copy(update={"teacher": section})
    assert params.image_sizes == (28, 56)
    teacher.run(params, PATHS)
    signals.run(params, PATHS)
    return params, large


def test_signals_are_what_the_teacher_says_at_its_size(larger):
    params, large = larger
    known = read_tensors(PATHS.signals)
    assert known["attention.0"].shape[-1] == 28 * 28, "half of the teacher's pixels a side"
    model, seen = solo_models(params.model_copy(update={"networks": {}}), PATHS, load_dataset(PATHS))["teacher"], large
    _, logits = predict(model, seen[load_dataset(PATHS).validation])
    torch.testing.assert_close(known["validation_logits"].float(), logits, rtol=0.03, atol=0.03)


def test_teacher_is_scored_and_exported_at_its_size(larger, folder):
    own, _ = larger
    students, seen = load_dataset(PATHS), load_teacher_dataset(PATHS)
    first = next(score_all(own, PATHS, students))
    assert first.correct.shape == (1, 30)
    models = solo_models(own.model_copy(update={"networks": {}}), PATHS, students)
    (folder / "solo").mkdir()
    manifest = export_solo(models, students, folder / "solo", "float32", seen)["teacher"]
    assert manifest["image"]["size"] == 56
    assert manifest["test_accuracy"] == pytest.approx(first.correct.mean())


@pytest.mark.usefixtures("larger")
def test_a_network_of_a_fixed_size_is_built_for_the_teacher_s_images(monkeypatch):
    write_json(PATHS.teacher_info, read_json(PATHS.teacher_info) | {"architecture": None})
    monkeypatch.setattr(loading, "load_foreign", lambda _info, _tensors, data: data.size)
    assert loading.load_teacher(PATHS) == 56


def test_batches_of_larger_images_have_no_more_pixels():
    assert [scaled_batch_size(500, size) for size in (28, 32, 64, 256, 1024)] == [500, 500, 125, 7, 1]
