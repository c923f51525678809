"""Students and baselines: what they learn from, what they do not, and that a seed decides everything else."""

import itertools

import pytest
import torch
from experiments import read_subset

from nonn.core.architecture import Architecture
from nonn.core.artifacts import ImageSpec
from nonn.core.errors import UserError
from nonn.core.files import STATE, TEMPORARY, read_json, write_json
from nonn.core.params import PARTITION_METHODS, SINGLE_METHODS
from nonn.core.paths import Paths
from nonn.core.training_params import AugmentParams
from nonn.data.dataset import load_dataset
from nonn.data.tensors import read_tensors
from nonn.method.loading import load_baseline
from nonn.method.sizing import design_network
from nonn.stages import baseline
from nonn.stages import distill as distill_stage
from nonn.stages.baseline import plan_students
from nonn.teachers.loading import load_teacher
from nonn.teachers.signals import signals_of
from nonn.training import loop as training
from nonn.training.augment import draw_view
from nonn.training.checkpoint import Checkpoint
from nonn.training.distillation import StudentSpec, TransferSet, distill_student
from nonn.training.networks import ConvNet, predict

STUDENT = Architecture(family="fast", widths=[4, 8, 12], depth=1)


@pytest.fixture
def transfer_set(params, experiment) -> TransferSet:
    return TransferSet(load_dataset(experiment), read_tensors(experiment.signals), params.signals)


@pytest.fixture
def teach(params):
    """A function that trains one student for two epochs and returns weights and log."""

    def train(transfer_set, seed=0, epochs=2, **spec):
        spec = StudentSpec(**{"architecture": STUDENT, "filters": [1, 4, 9], "kd_weight": 0.9} | spec)
        schedule = params.distill.model_copy(update={"epochs": epochs})
        checkpoint = Checkpoint.of("test", [])
        checkpoint.discard()
        student, log = distill_student(transfer_set, spec, schedule, seed=seed, checkpoint=checkpoint, label="test")
        return student.state_dict(), log

    return train


def changed(transfer_set: TransferSet, name: str, change) -> TransferSet:
    """A transfer_set in which the teacher says something else."""
    signals = dict(transfer_set.signals)
    signals[name] = change(signals[name])
    return TransferSet(transfer_set.data, signals, transfer_set.params)


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(tensor, b[name]) for name, tensor in a.items())


# What a student learns


def test_a_student_learns(teach, transfer_set):
    weights, log = teach(transfer_set, epochs=6, transfer_weight=1.0)
    assert log[-1]["train_loss"] < 0.5 * log[0]["train_loss"]
    assert log[-1]["validation_accuracy"] > 0.6
    assert weights["bridge.0.weight"].shape == (3, 12, 1, 1)


def test_the_seed_decides(teach, transfer_set):
    first, log = teach(transfer_set)
    again, log_again = teach(transfer_set)
    other, _ = teach(transfer_set, seed=1)
    assert same(first, again)
    assert log == log_again
    assert not same(first, other)


def test_without_kd_the_teacher_is_not_heard(teach, transfer_set):
    silent = changed(transfer_set, "logits", torch.zeros_like)
    spec = {"filters": None, "kd_weight": 0.0}
    assert same(teach(transfer_set, **spec)[0], teach(silent, **spec)[0])
    assert not same(teach(transfer_set)[0], teach(silent)[0])


def test_with_kd_alone_the_labels_are_not_read(teach, transfer_set):
    relabelled = TransferSet(transfer_set.data, transfer_set.signals, transfer_set.params)
    relabelled.labels = (transfer_set.labels + 1) % 3
    spec = {"filters": None, "kd_weight": 1.0}
    assert same(teach(transfer_set, **spec)[0], teach(relabelled, **spec)[0])
    assert not same(teach(transfer_set)[0], teach(relabelled)[0])


def test_only_the_student_s_own_filters_are_transferred(teach, transfer_set):
    def silence(filters):
        return changed(transfer_set, "pooled", lambda t: t.clone().index_fill_(2, torch.tensor(filters), 0.5))

    spec = {"transfer_weight": 1.0}
    reference, _ = teach(transfer_set, **spec)
    assert same(reference, teach(silence([0, 2, 3, 5, 8, 31]), **spec)[0])
    assert not same(reference, teach(silence([4]), **spec)[0])


def test_attention_is_transferred_where_sizes_agree(teach, transfer_set):
    spec = {"filters": None, "attention_weight": 100.0}
    reference, _ = teach(transfer_set, **spec)
    assert not same(reference, teach(transfer_set, filters=None)[0])
    uniform = changed(transfer_set, "attention.1", lambda t: torch.full_like(t, 1 / 7))
    assert not same(reference, teach(uniform, **spec)[0])
    # A WRN halves its maps later than the teacher: 28, 14, 7 against 14, 7, 3.
    spec["architecture"] = Architecture(family="wrn", depth=10)
    reference, _ = teach(transfer_set, epochs=1, **spec)
    for stage, is_shared in ((0, True), (1, True), (2, False)):
        other = changed(transfer_set, f"attention.{stage}", lambda t: t.roll(1, 2))
        assert same(reference, teach(other, epochs=1, **spec)[0]) == (not is_shared)


def test_attention_without_a_common_size_is_refused(teach, transfer_set):
    for stage in range(3):
        transfer_set = changed(transfer_set, f"attention.{stage}", lambda t: t[:, :, :5])
    with pytest.raises(UserError, match=r"params\.yaml: the baseline at_kd: no stage"):
        teach(transfer_set, filters=None, attention_weight=1.0)


def test_epochs_see_the_views_in_turn(transfer_set):
    assert [transfer_set.view(epoch)[0] for epoch in range(5)] == [0, 1, 0, 1, 0]
    expected = draw_view(60, 1, transfer_set.params.augment, transfer_set.params.seed)
    _, view = transfer_set.view(3)
    assert torch.equal(view.top, expected.top)
    assert torch.equal(view.left, expected.left)


def test_an_epoch_reads_the_signals_of_its_own_view(teach, transfer_set):
    other = changed(transfer_set, "logits", lambda t: torch.stack([t[0], t[1].roll(1, 1)]))
    assert same(teach(transfer_set, epochs=1)[0], teach(other, epochs=1)[0])
    assert not same(teach(transfer_set, epochs=2)[0], teach(other, epochs=2)[0])


def test_a_student_sees_the_pixels_that_the_teacher_saw(params, transfer_set, teach):
    other = params.signals.model_copy(update={"augment": AugmentParams(pad=2, flip=True)})
    assert not same(teach(transfer_set)[0], teach(TransferSet(transfer_set.data, transfer_set.signals, other))[0])


class TaughtLive(TransferSet):
    """The teacher looks at every batch itself, as in the authors' code: nothing is cached."""

    def __init__(self, transfer_set: TransferSet, teacher: ConvNet):
        super().__init__(transfer_set.data, {}, transfer_set.params)
        self.teacher = teacher

    def signals_for(self, spec):
        self.filters = spec.filters
        return dict.fromkeys(("logits", "pooled"))

    def batch(self, index, epoch, _):
        images, labels = super().batch(index, epoch, [])
        said = signals_of(self.teacher, images, attention=False)
        return images, labels, said["logits"], said["pooled"][:, self.filters]


def test_cached_signals_teach_what_a_teacher_inside_the_step_would(teach, transfer_set, experiment):
    def losses(room: TransferSet):
        return [
            row["train_loss"] for row in teach(room, epochs=3, transfer_weight=10.0)[1]
        ]  # two views, the first again

    cached = losses(transfer_set)
    assert losses(TaughtLive(transfer_set, load_teacher(experiment))) == pytest.approx(cached, rel=1e-2)
    untaught = changed(changed(transfer_set, "logits", torch.zeros_like), "pooled", torch.zeros_like)
    assert losses(untaught) != pytest.approx(cached, rel=1e-2)


# The stage


def test_the_stage_writes_the_same_bytes_again(params, experiment):
    weights = experiment.student("2s", 1, 0)
    before = {path: path.read_bytes() for path in (weights, experiment.log(weights))}
    for path in before:
        path.unlink()
    distill_stage.run(params, experiment, "2s", 1, 0)
    assert {path: path.read_bytes() for path in before} == before


def test_students_and_seeds_differ_in_their_start(params, experiment, monkeypatch):
    seeds = []

    def note(*_, seed, **__):
        seeds.append(seed)
        raise KeyboardInterrupt

    monkeypatch.setattr(distill_stage, "distill_student", note)
    for student in (0, 1):
        for seed in (0, 1, 2):
            with pytest.raises(KeyboardInterrupt):
                distill_stage.run(params, experiment, "2s", student, seed)
    assert len(set(seeds)) == 6


@pytest.mark.parametrize(
    ("run", "path", "item", "killed_after"),
    [(distill_stage.run, Paths.student, ("2s", 0, 0), 3), (baseline.run, Paths.baseline, ("2s", "random", 0), 7)],
    ids=["student", "second student of a baseline"],
)
def test_a_killed_stage_resumes_to_the_same_bytes(params, experiment, monkeypatch, run, path, item, killed_after):
    target = path(experiment, *item)
    before = target.read_bytes()
    target.unlink()
    calls = itertools.count(1)

    def die(*arguments):
        if next(calls) == killed_after:  # epochs
            raise KeyboardInterrupt
        return predict(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training, "predict", die)
        with pytest.raises(KeyboardInterrupt):
            run(params, experiment, *item)
    assert not target.exists()
    assert list((STATE / "checkpoints").iterdir())
    trained = []
    monkeypatch.setattr(training, "predict", lambda *arguments: trained.append(1) or predict(*arguments))
    run(params, experiment, *item)
    assert len(trained) == params.distill.epochs * (1 if run is distill_stage.run else 2) - (killed_after - 1)
    assert target.read_bytes() == before
    assert not list((STATE / "checkpoints").iterdir())
    assert not list(STATE.parent.rglob(f"{TEMPORARY}*"))


# Baselines


@pytest.fixture
def specs(params, experiment):
    """A function that plans the specs of a method."""
    return lambda method, seed=0: plan_students(params, experiment, "2s", method, seed)


def test_single_students_have_no_filters(params, specs):
    weight = params.distill.kd_weight
    for method in SINGLE_METHODS:
        (spec,) = specs(method)
        assert spec.filters is None
        assert spec.transfer_weight == 0
        assert spec.kd_weight == (0 if method == "labels" else weight)
        assert spec.attention_weight == (params.baseline.attention_weight if method == "at_kd" else 0)
    (alone,), (total,) = specs("kd"), specs("total")
    assert max(total.architecture.widths) > max(alone.architecture.widths)


def test_partition_ablations_learn_like_the_network(params, experiment, specs):
    sizes, live = (
        read_json(experiment.filter_counts("2s"))["sizes"],
        read_json(experiment.partition("2s", "full"))["sets"][0],
    )
    for method in PARTITION_METHODS:
        for spec, size in zip(specs(method), sizes, strict=True):
            assert (spec.kd_weight, spec.transfer_weight) == (
                params.distill.kd_weight,
                params.distill.transfer_weight,
            )
            assert spec.attention_weight == 0
            assert len(spec.filters) == (len(live) if method == "full" else size)
        if method != "full":
            assert sorted(f for spec in specs(method) for f in spec.filters) == live
    assert [spec.filters for spec in specs("full")] == [live, live]


def test_every_seed_has_a_random_partition_of_its_own(specs):
    drawn = [[spec.filters for spec in specs("random", seed)] for seed in range(3)]
    assert drawn[0] != drawn[1] != drawn[2] != drawn[0]
    assert drawn[1] == [spec.filters for spec in specs("random", 1)]
    fixed = [[spec.filters for spec in specs("contiguous", seed)] for seed in range(2)]
    assert fixed[0] == fixed[1]


def test_dead_filters_are_left_to_nobody(params, experiment, specs):
    """A teacher with 32 filters of which 30 are alive: every student transfers 30 in `full`."""
    devices = params.budgets_of("2s")
    info = read_json(experiment.dataset_info)
    _, designs = design_network(params.design, devices, ImageSpec.of(info), n_live=30)
    live = [f for f in range(32) if f not in (3, 17)]
    write_json(experiment.design("2s", "full"), designs["full"])
    write_json(experiment.partition("2s", "full"), {"sets": [live, live]})
    for spec, design in zip(specs("full"), designs["full"], strict=True):
        assert len(spec.filters) == design["n_filters"] == 30


def test_the_stage_writes_students_that_can_be_read(params, data, experiment):
    images, labels = read_subset(data, "validation")
    for network, method, seeds in params.baselines():
        for seed in seeds:
            path = experiment.baseline(network, method, seed)
            students = load_baseline(path, data)
            assert len(students) == (2 if method in PARTITION_METHODS else 1)
            rows = experiment.log(path).read_text().splitlines()
            assert len(rows) == 1 + len(students) * params.distill.epochs
            for position, student in enumerate(students):
                logged = float(rows[(position + 1) * params.distill.epochs].split(",")[3])
                right = (predict(student, images)[1].argmax(1) == labels).double().mean()
                assert right.item() == pytest.approx(logged, abs=1e-5)


def test_the_baseline_stage_writes_the_same_bytes_again(params, experiment):
    weights = experiment.baseline("2s", "at_kd", 0)
    before = {path: path.read_bytes() for path in weights.parent.glob("at_kd.*")}
    assert len(before) == 3
    for path in before:
        path.unlink()
    baseline.run(params, experiment, "2s", "at_kd", 0)
    assert {path: path.read_bytes() for path in before} == before


def test_seeds_of_a_baseline_differ(experiment):
    one, two = (read_tensors(experiment.baseline("2s", "kd", seed)) for seed in (0, 1))
    assert not torch.equal(one["0.head.weight"], two["0.head.weight"])
