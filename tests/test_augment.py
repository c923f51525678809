"""Augmented views: the bulk crop against a plain loop, and that a view can be drawn again."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from nonn.core.training_params import AugmentParams
from nonn.training.augment import apply_view, draw_view

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
    augment = AugmentParams(pad=pad, flip=flip)
    view = draw_view(N_IMAGES, 1, augment, seed=3)
    cropped = apply_view(images, view, torch.arange(N_IMAGES), augment)
    assert cropped.dtype == torch.uint8
    np.testing.assert_array_equal(cropped.numpy(), naive_view(images, view, pad))


def test_a_view_is_a_function_of_number_and_seed():
    augment = AugmentParams(pad=4, flip=True)

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
    augment = AugmentParams(pad=0, flip=False)
    view = draw_view(N_IMAGES, 5, augment, seed=0)
    assert torch.equal(apply_view(images, view, torch.arange(N_IMAGES), augment), images)


def test_flips_alternate_from_view_to_view():
    flips = [draw_view(N_IMAGES, view, AugmentParams(pad=2, flip=True), seed=0).flip for view in range(4)]
    assert torch.equal(flips[1], ~flips[0])
    assert torch.equal(flips[2], flips[0])
    assert torch.equal(flips[3], flips[1])
    assert 0.3 * N_IMAGES < flips[0].sum() < 0.7 * N_IMAGES


def test_crops_use_the_whole_border_and_no_more():
    view = draw_view(N_IMAGES, 0, AugmentParams(pad=3, flip=False), seed=0)
    assert set(view.top.tolist()) == set(view.left.tolist()) == set(range(7))
    assert not view.flip.any()


def test_a_subset_is_the_subset_of_all():
    images = random_images()
    augment = AugmentParams(pad=2, flip=True, cutout=5)
    view = draw_view(N_IMAGES, 1, augment, seed=0)
    index = torch.tensor([7, 0, 199, 7, 42])
    everything = apply_view(images, view, torch.arange(N_IMAGES), augment)
    assert torch.equal(apply_view(images, view, index, augment), everything[index])


def test_cutout_hides_one_square_of_each_image_anywhere_inside_it():
    images, augment = random_images(), AugmentParams(pad=2, flip=True, cutout=5)
    images[images == 128] = 0
    view = draw_view(N_IMAGES, 1, augment, seed=0)
    whole = apply_view(images, replace(view, hole=None), torch.arange(N_IMAGES), augment)
    cut = apply_view(images, view, torch.arange(N_IMAGES), augment)
    hidden = cut == 128
    assert torch.equal(cut[~hidden], whole[~hidden])
    tops, lefts = set(), set()
    for image in hidden:
        _, rows, columns = (where.unique().tolist() for where in image.nonzero().T)
        assert rows == list(range(rows[0], rows[0] + 5))
        assert columns == list(range(columns[0], columns[0] + 5))
        assert image.sum() == 3 * 5 * 5  # that square, in every channel
        tops.add(rows[0])
        lefts.add(columns[0])
    assert tops == lefts == set(range(12 - 5 + 1))


def test_cutout_changes_nothing_else_of_a_view():
    with_it, without = (draw_view(N_IMAGES, 3, AugmentParams(pad=2, flip=True, cutout=c), seed=0) for c in (5, 0))
    assert torch.equal(with_it.top, without.top)
    assert torch.equal(with_it.left, without.left)
    assert torch.equal(with_it.flip, without.flip)
    assert without.hole is None


def test_cutout_larger_than_the_image_hides_all_of_it():
    augment = AugmentParams(pad=0, flip=False, cutout=64)
    view = draw_view(N_IMAGES, 0, augment, seed=0)
    assert (apply_view(random_images(), view, torch.arange(N_IMAGES), augment) == 128).all()


@pytest.mark.parametrize("size", [36, 18])
def test_a_view_of_larger_images_shows_the_same(size):
    """Larger images are the small ones with each pixel repeated: away from the border, so is their view."""
    images, augment = random_images(), AugmentParams(pad=2, flip=True, cutout=4)
    scale = size / 12
    places = (torch.arange(size) / scale).long()
    large = images[:, :, places][..., places]
    view, index = draw_view(N_IMAGES, 0, augment, seed=3), torch.arange(0, N_IMAGES, 3)
    small, seen = apply_view(images, view, index, augment), apply_view(large, view, index, augment, drawn_for=12)
    assert seen.shape == (len(index), 3, size, size)
    expected = small[:, :, places][..., places]
    border = round(2 * scale)
    same = (seen == expected)[..., border:-border, border:-border].float().mean()
    # Half a pixel that was rounded shifts every second column of some images.
    assert same == 1 if size == 36 else same > 0.6
