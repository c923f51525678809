"""Muon: its orthogonalization against singular values, its step against the formula by hand."""

import pytest
import torch
from torch import nn

from nonn.training.optim import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(16, 144), (40, 9), (32, 32)])
def test_singular_values_come_near_one_and_directions_stay(shape):
    torch.manual_seed(0)
    u, _, vt = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    singular = torch.linspace(0.2, 1, len(vt))
    matrix = u * singular @ vt
    result = orthogonalize(matrix)
    assert result.shape == shape
    assert result.dtype == torch.float32
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.3
    assert values.max() < 1.3
    rotated = u.T @ result @ vt.T  # diagonal where the singular vectors are those of before
    off_diagonal = rotated - rotated.diagonal().diag()
    assert off_diagonal.abs().max() < 0.05


def test_scale_of_the_gradient_does_not_matter_and_zero_stays_zero():
    torch.manual_seed(0)
    matrix = torch.randn(8, 20)
    torch.testing.assert_close(orthogonalize(1024 * matrix), orthogonalize(matrix))
    assert torch.equal(orthogonalize(torch.zeros(3, 4)), torch.zeros(3, 4))


def test_two_steps_by_hand():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(6, 2, 3, 3))
    optimizer = Muon([weight], lr=0.1, momentum=0.5)
    first, second = torch.randn(2, 6, 2, 3, 3)
    expected, momentum = weight.detach().clone(), torch.zeros(6, 2, 3, 3)
    for gradient in (first, second):
        weight.grad = gradient.clone()
        optimizer.step()
        momentum = 0.5 * momentum + gradient
        direction = orthogonalize((gradient + 0.5 * momentum).reshape(6, 18)).reshape(6, 2, 3, 3)
        expected = 6**0.5 * expected / expected.norm() - 0.1 * direction
    torch.testing.assert_close(weight.detach(), expected)
