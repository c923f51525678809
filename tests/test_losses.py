"""The losses, against values by hand and against the formulas in NumPy."""

from math import log

import numpy as np
import pytest
import torch

from nonn.training.losses import attention_loss, attention_map, kd_loss, transfer_loss


def random_tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_kd_is_zero_when_student_equals_teacher():
    logits = 5 * random_tensor(6, 10)
    assert kd_loss(logits, logits, temperature=4.0).item() == pytest.approx(0, abs=1e-6)
    # Probabilities, not logits, are compared.
    assert kd_loss(logits + 3, logits, temperature=4.0).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("temperature", [1, 2, 4])
def test_kd_of_two_classes_by_hand(temperature):
    """At temperature T the teacher says (3/4, 1/4) and the student (1/2, 1/2)."""
    teacher, student = torch.tensor([[temperature * log(3), 0.0]]), torch.zeros(1, 2)
    divergence = 3 / 4 * log(3 / 2) + 1 / 4 * log(1 / 2)
    assert kd_loss(student, teacher, temperature).item() == pytest.approx(temperature**2 * divergence, rel=1e-6)


def test_kd_equals_the_formula():
    student, teacher = 3 * random_tensor(5, 7), 3 * random_tensor(5, 7, seed=1)

    def softmax(logits):
        exponentials = np.exp(logits.double().numpy() / 4)
        return exponentials / exponentials.sum(1, keepdims=True)

    p, q = softmax(teacher), softmax(student)
    expected = 4**2 * (p * np.log(p / q)).sum(1).mean()
    assert kd_loss(student, teacher, 4.0).item() == pytest.approx(expected, rel=1e-5)


def test_transfer_is_zero_for_proportional_vectors():
    activations = random_tensor(4, 6).abs()
    assert transfer_loss(activations * torch.tensor([[0.1], [2], [30], [1]]), activations).item() < 1e-12


def test_transfer_by_hand():
    """(3, 4) and (5, 12) are (3/5, 4/5) and (5/13, 12/13) when scaled to unit length; orthogonal ones differ by 2."""
    expected = (3 / 5 - 5 / 13) ** 2 + (4 / 5 - 12 / 13) ** 2
    features, activations = torch.tensor([[3.0, 4.0]]), torch.tensor([[5.0, 12.0]])
    assert transfer_loss(features, activations).item() == pytest.approx(expected, rel=1e-5)
    orthogonal = transfer_loss(torch.tensor([[7.0, 0.0]]), torch.tensor([[0.0, 0.2]]))
    assert orthogonal.item() == pytest.approx(2)
    both = transfer_loss(torch.tensor([[3.0, 4.0], [7.0, 0.0]]), torch.tensor([[5.0, 12.0], [0.0, 0.2]]))
    assert both.item() == pytest.approx((expected + 2) / 2, rel=1e-5)


def test_transfer_bears_filters_that_are_silent():
    features = torch.zeros(2, 3, requires_grad=True)
    loss = transfer_loss(features, torch.ones(2, 3))
    loss.backward()
    assert loss.item() == pytest.approx(1)
    assert features.grad.isfinite().all()


def test_attention_map_by_hand():
    """Two channels of 1×2: the squares' means are (9 + 7) / 2 = 8 and (4 + 8) / 2 = 6, of length 10."""
    stage = torch.tensor([[[[3.0, 2.0]], [[7**0.5, 8**0.5]]]])
    torch.testing.assert_close(attention_map(stage), torch.tensor([[0.8, 0.6]]))


def test_attention_maps_have_unit_length():
    maps = attention_map(random_tensor(4, 3, 5, 6))
    assert maps.shape == (4, 5 * 6)
    torch.testing.assert_close(maps.norm(dim=1), torch.ones(4))


def test_attention_loss_is_zero_for_the_same_attention():
    maps = [random_tensor(2, 3, 4, 4), random_tensor(2, 6, 2, 2)]
    assert attention_loss(maps, [attention_map(m) for m in maps]).item() == 0


def test_attention_loss_sums_over_the_stages():
    """(1, 0) against (0, 1) is a mean squared difference of 1."""
    stage, teacher = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[0.0, 1.0]])
    assert attention_loss([stage], [teacher]).item() == 1
    assert attention_loss([stage, stage], [teacher, teacher]).item() == 2
