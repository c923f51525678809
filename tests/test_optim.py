"""Optimizers: PyTorch's own steps without its compiler; Muon's against singular values and the formula by hand."""

import os
import subprocess
import sys

import pytest
import torch
from experiments import REPOSITORY
from torch import nn

from nonn.training.optim import SGD, Adam, Muon, orthogonalize


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


@pytest.mark.parametrize(
    ("plain", "original", "options"),
    [
        (SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
        (Adam, torch.optim.Adam, {"lr": 0.1, "fused": True}),
    ],
)
def test_steps_and_states_are_those_of_pytorch(plain, original, options):
    ends = []
    for kind in (plain, original):
        weight = nn.Parameter(torch.linspace(-1, 1, 7))
        optimizer = kind([weight], **options)
        for _ in range(3):
            optimizer.zero_grad()
            (weight**2).sum().backward()
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
        ends.append((weight.detach(), optimizer.state_dict()))
    (own, own_state), (expected, state) = ends
    assert torch.equal(own, expected)
    assert own_state["param_groups"] == state["param_groups"]
    torch.testing.assert_close(own_state["state"], state["state"], rtol=0, atol=0)


def test_a_training_does_not_import_the_compiler():
    script = """
import sys, torch
from nonn.training.optim import SGD, Adam, Muon
for kind, options in ((SGD, {"lr": 1}), (Adam, {"lr": 1, "fused": True}), (Muon, {"lr": 1, "momentum": 0})):
    weight = torch.nn.Parameter(torch.ones(2, 2, 3, 3))
    optimizer = kind([weight], **options)
    (weight**2).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
print("torch._dynamo" in sys.modules)
"""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
