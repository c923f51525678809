"""The training loop: its schedule, its order of images, and that a killed training ends in the same weights."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from experiments import read_subset

from nonn.core.architecture import Architecture
from nonn.core.errors import UserError
from nonn.core.files import STATE
from nonn.core.training_params import MuonParams, ScheduleParams
from nonn.training import checkpoint as checkpoint_module
from nonn.training.checkpoint import Checkpoint
from nonn.training.loop import LOG_COLUMNS, epoch_order, train, write_log
from nonn.training.networks import ConvNet
from nonn.training.optim import learning_rate, make_optimizers

SCHEDULE = ScheduleParams(epochs=4, batch_size=16, lr=0.05, momentum=0.9, weight_decay=0.01, warmup=0.25)
WITH_MUON = SCHEDULE.model_copy(update={"muon": MuonParams(lr=0.1, momentum=0.6)})
CPU = torch.device("cpu")


class KilledError(Exception):
    pass


def make_network(data) -> ConvNet:
    torch.manual_seed(0)
    return ConvNet(
        Architecture(family="fast", widths=[4, 8, 12], depth=1), data.channels, 3, mean=data.mean, std=data.std
    )


def fit(data, checkpoint, schedule=SCHEDULE, seed=0, kill_at=None, seen=None):
    """Train a network on labels; `seen` collects the epochs and images, `kill_at` is the epoch to die in."""
    model = make_network(data)
    images, labels = read_subset(data, "train")

    def batch_of(index, epoch):
        if epoch == kill_at:
            raise KilledError
        if seen is not None:
            seen.append((epoch, index))
        return images[index], labels[index]

    def loss_of(batch, targets):
        return F.cross_entropy(model(batch)[1], targets)

    log = train(
        model,
        batch_of,
        loss_of,
        len(images),
        schedule,
        seed=seed,
        validation=read_subset(data, "validation"),
        checkpoint=checkpoint,
        device=CPU,
        label="test",
        section="distill",
    )
    return model, log


# The schedule


def test_learning_rate_rises_to_its_peak_and_falls_to_zero():
    rates = [learning_rate(step, 100, SCHEDULE.lr, SCHEDULE.warmup) for step in range(100)]
    assert max(rates) == rates[25] == SCHEDULE.lr
    assert all(a < b for a, b in itertools.pairwise(rates[:26]))
    assert all(a > b for a, b in itertools.pairwise(rates[25:]))
    assert rates[0] == pytest.approx(SCHEDULE.lr / 26)
    assert 0 < rates[-1] == pytest.approx(SCHEDULE.lr / 75)


@pytest.mark.parametrize("warmup", [0.0, 0.33, 1.0])
def test_learning_rate_is_positive_and_at_most_its_peak(warmup):
    rates = [learning_rate(step, 10, 0.05, warmup) for step in range(10)]
    assert min(rates) > 0
    assert 0.9 * 0.05 <= max(rates) <= 0.05


def test_epoch_order_is_a_permutation_of_its_own():
    orders = [epoch_order(50, epoch, seed) for epoch, seed in [(0, 0), (1, 0), (0, 1), (1, 1)]]
    for order in orders:
        assert sorted(order.tolist()) == list(range(50))
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(orders, 2))
    assert torch.equal(epoch_order(50, 1, 0), orders[1])


def test_batches_are_full_and_an_image_comes_once_an_epoch(data, checkpoint):
    seen = []
    fit(data, checkpoint, seen=seen)
    for epoch in range(SCHEDULE.epochs):
        batches = [index for e, index in seen if e == epoch]
        assert [len(index) for index in batches] == [16, 16, 16], "60 images: the last 12 are left out"
        assert len(torch.cat(batches).unique()) == 48


def test_batch_norm_and_biases_are_not_decayed(data):
    model = make_network(data)
    groups = make_optimizers(model, SCHEDULE)[0].param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_kernel = name == "weight" and not isinstance(module, torch.nn.BatchNorm2d)
            assert decay[id(parameter)] == (SCHEDULE.weight_decay if is_kernel else 0)


def test_muon_takes_the_filters_and_sgd_the_rest(data):
    model = make_network(data)
    sgd, muon = make_optimizers(model, WITH_MUON)
    by_sgd, by_muon = ([id(p) for group in o.param_groups for p in group["params"]] for o in (sgd, muon))
    assert set(by_muon) == {id(p) for p in model.parameters() if p.ndim == 4}
    assert sorted(by_sgd + by_muon) == sorted(map(id, model.parameters()))
    assert [group["lr"] for group in muon.param_groups] == [WITH_MUON.muon.lr]


def test_what_is_frozen_is_not_trained(data):
    model = make_network(data)
    model.stem[0].weight.requires_grad_(False)
    for schedule in (SCHEDULE, WITH_MUON):
        optimizers = make_optimizers(model, schedule)
        taken = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
        assert id(model.stem[0].weight) not in taken
        assert id(model.stages[0][0].weight) in taken


def test_training_learns_and_logs(data, checkpoint):
    _, log = fit(data, checkpoint)
    assert all(list(row) == LOG_COLUMNS for row in log)
    assert [row["epoch"] for row in log] == [1, 2, 3, 4]
    assert log[-1]["train_loss"] < log[0]["train_loss"]
    assert all(0 <= row["validation_accuracy"] <= 1 for row in log)


def test_a_training_that_diverges_ends_with_what_to_do(data, checkpoint):
    with pytest.raises(
        UserError, match=r"^test: its training has diverged: .* epoch 1 .* Lower .* distill\.lr in params"
    ):
        fit(data, checkpoint, SCHEDULE.model_copy(update={"lr": 1e12}))


# Checkpoints


@pytest.mark.parametrize("schedule", [SCHEDULE, WITH_MUON], ids=["sgd", "muon"])
def test_a_killed_training_resumes_to_the_same_weights_and_log(data, folder, schedule):
    whole, whole_log = fit(data, Checkpoint(folder / "whole.safetensors"), schedule)
    checkpoint = Checkpoint(folder / "killed.safetensors")
    with pytest.raises(KilledError):
        fit(data, checkpoint, schedule, kill_at=2)
    seen = []
    resumed, resumed_log = fit(data, checkpoint, schedule, seen=seen)
    assert {epoch for epoch, _ in seen} == {2, 3}, "epochs 0 and 1 are not repeated"
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    write_log(folder / "whole.csv", whole_log)
    write_log(folder / "resumed.csv", resumed_log)
    assert (folder / "whole.csv").read_bytes() == (folder / "resumed.csv").read_bytes()
    assert (folder / "whole.safetensors").read_bytes() == checkpoint.path.read_bytes()


def test_a_finished_training_is_only_read(data, checkpoint):
    model, log = fit(data, checkpoint)
    again, log_again = fit(data, checkpoint, kill_at=0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert log_again == log


def test_a_checkpoint_of_other_settings_inputs_or_code_is_not_resumed(data, folder, monkeypatch):
    one, two = folder / "one", folder / "two"
    one.write_text("signals")
    two.write_text("other signals")
    checkpoint = Checkpoint.of(["student", {"lr": 0.1}], [one])
    others = [
        Checkpoint.of(["student", {"lr": 0.2}], [one]),
        Checkpoint.of(["student 2", {"lr": 0.1}], [one]),
        Checkpoint.of(["student", {"lr": 0.1}], [two]),
        Checkpoint.of(["student", {"lr": 0.1}], [one, one]),
        checkpoint.part(0),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "CODE", [*checkpoint_module.CODE, one])
        others.append(Checkpoint.of(["student", {"lr": 0.1}], [one]))
    assert len({checkpoint.path, *(other.path for other in others)}) == 7
    assert Checkpoint.of(["student", {"lr": 0.1}], [one]) == checkpoint
    with pytest.raises(KilledError):
        fit(data, checkpoint, kill_at=1)
    for other in others:
        seen = []
        with pytest.raises(KilledError):
            fit(data, other, kill_at=1, seen=seen)
        assert {epoch for epoch, _ in seen} == {0}


def test_content_not_the_name_of_an_input_counts(folder):
    one, two = folder / "one", folder / "two"
    one.write_text("signals")
    two.write_text("signals")
    assert Checkpoint.of([], [one]) == Checkpoint.of([], [two])


def test_discard_removes_the_checkpoint_and_its_parts_only(data, folder):
    mine, other = Checkpoint.of("mine", []), Checkpoint.of("other", [])
    for checkpoint in (mine, mine.part(0), mine.part(1), other, other.part(0)):
        with pytest.raises(KilledError):
            fit(data, checkpoint, kill_at=1)
    assert len(list((folder / STATE / "checkpoints").iterdir())) == 5
    mine.discard()
    assert sorted((STATE / "checkpoints").iterdir()) == sorted([other.path, other.part(0).path])
    mine.discard()
