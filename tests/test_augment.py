"""Augmented views: the bulk crop against a plain loop, and that a view can be drawn again."""

import numpy as np
import pytest
import torch

from nonn.augment import apply_view, draw_view
from nonn.params import Augment

N_IMAGES = 200


def random_images(n_images: int = N_IMAGES, channels: int = 3, size: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n_images, channels, size, size), generator=generator, dtype=torch.uint8)


def naive_view(images: torch.Tensor, view, pad: int) -> np.ndarray:
    result = np.empty(images.shape, np.uint8)
    for i, image in enumerate(images.numpy()):
        padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)), mode="reflect")
        top, left = int(view.top[i]), int(view.left[i])
        crop = padded[:, top : top + image.shape[1], left : left + image.shape[2]]
        result[i] = crop[:, :, ::-1] if view.flip[i] else crop
    return result


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("pad", [0, 1, 4])
@pytest.mark.parametrize("channels", [1, 3])
def test_bulk_crops_equal_a_loop(channels, pad, flip):
    images = random_images(channels=channels)
    view = draw_view(N_IMAGES, 1, Augment(pad=pad, flip=flip), seed=3)
    cropped = apply_view(images, view, torch.arange(N_IMAGES), pad)
    assert cropped.dtype == torch.uint8
    np.testing.assert_array_equal(cropped.numpy(), naive_view(images, view, pad))


def test_a_view_is_a_function_of_number_and_seed():
    augment = Augment(pad=4, flip=True)

    def drawn(view: int, seed: int) -> torch.Tensor:
        view = draw_view(N_IMAGES, view, augment, seed)
        return torch.stack([view.top, view.left, view.flip.long()])

    first = drawn(2, 0)
    torch.rand(5)  # the ambient generator has no part in it
    assert torch.equal(drawn(2, 0), first)
    for other in (drawn(3, 0), drawn(2, 1)):
        assert not torch.equal(other[:2], first[:2])


def test_no_padding_and_no_flip_is_the_image():
    images = random_images()
    view = draw_view(N_IMAGES, 5, Augment(pad=0, flip=False), seed=0)
    assert torch.equal(apply_view(images, view, torch.arange(N_IMAGES), 0), images)


def test_flips_alternate_from_view_to_view():
    flips = [draw_view(N_IMAGES, view, Augment(pad=2, flip=True), seed=0).flip for view in range(4)]
    assert torch.equal(flips[1], ~flips[0])
    assert torch.equal(flips[2], flips[0])
    assert torch.equal(flips[3], flips[1])
    assert 0.3 * N_IMAGES < flips[0].sum() < 0.7 * N_IMAGES


def test_crops_use_the_whole_border_and_no_more():
    view = draw_view(N_IMAGES, 0, Augment(pad=3, flip=False), seed=0)
    assert set(view.top.tolist()) == set(view.left.tolist()) == set(range(7))
    assert not view.flip.any()


def test_a_subset_is_the_subset_of_all():
    images = random_images()
    view = draw_view(N_IMAGES, 1, Augment(pad=2, flip=True), seed=0)
    index = torch.tensor([7, 0, 199, 7, 42])
    everything = apply_view(images, view, torch.arange(N_IMAGES), 2)
    assert torch.equal(apply_view(images, view, index, 2), everything[index])
