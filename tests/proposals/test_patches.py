"""Patches: hand-worked crops, the image's edge, no leak between images, coordinates."""

import pytest
import torch
from detectron2.structures import ImageList

from d2proposals.proposals.patches import boxes_from_patch, boxes_to_patch, crop_patches
from tests.common import make_images


def crop_one(image: torch.Tensor, box, size, **kwargs) -> torch.Tensor:
    images = ImageList.from_tensors([image])
    index = torch.zeros(1, dtype=torch.int64)
    return crop_patches(images, torch.tensor([box]).float(), index, size, **kwargs)[0]


def test_whole_pixels_are_copied():
    image = torch.randn(3, 9, 11)
    patch = crop_one(image, [2, 3, 7, 9], (6, 5))
    torch.testing.assert_close(patch, image[:, 3:9, 2:7])


def test_smaller_patches_average():
    image = torch.randn(1, 8, 12)
    patch = crop_one(image, [0, 0, 12, 8], (2, 3))
    averages = torch.nn.functional.avg_pool2d(image, 4)
    torch.testing.assert_close(patch, averages)


def test_outside_the_image_is_zero():
    image = torch.ones(1, 4, 4)
    patch = crop_one(image, [-3, -2, 5, 6], (8, 8))
    expected = torch.zeros(1, 8, 8)
    expected[:, 2:6, 3:7] = 1
    torch.testing.assert_close(patch, expected)
    assert crop_one(image, [20, 20, 28, 28], (4, 4)).abs().max() == 0


def test_flipped_patches_are_mirrored():
    images = make_images((16, 16))
    boxes = torch.tensor([[1.0, 2, 9, 10]] * 2)
    index = torch.zeros(2, dtype=torch.int64)
    patches = crop_patches(images, boxes, index, (8, 8), torch.tensor([False, True]))
    torch.testing.assert_close(patches[1], patches[0].flip(-1))


@pytest.mark.parametrize("box", [[5, 5, 25, 22.5], [-4, 10, 40, 50], [19.5, 29.5, 20.5, 30.5]])
def test_an_image_gives_the_same_patch_alone_and_in_a_batch(box):
    batch = make_images((30, 20), (64, 48), divisibility=0)
    alone = make_images((30, 20), divisibility=0)
    torch.testing.assert_close(alone.tensor[0], batch[0])
    box, index = torch.tensor([box]).float(), torch.zeros(1, dtype=torch.int64)
    expected = crop_patches(alone, box, index, (12, 12))
    torch.testing.assert_close(crop_patches(batch, box, index, (12, 12)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_images_of_other_types(dtype):
    # Positions stay exact: in bfloat16, 515.25 would be 516.
    images = make_images((12, 600))
    box, index = torch.tensor([[515.25, 2.5, 535.25, 9.5]]), torch.zeros(1, dtype=torch.int64)
    rounded = ImageList(images.tensor.to(dtype), images.image_sizes)
    expected = ImageList(rounded.tensor.float(), images.image_sizes)
    expected = crop_patches(expected, box, index, (7, 20))
    patches = crop_patches(rounded, box, index, (7, 20))
    assert patches.dtype == dtype
    torch.testing.assert_close(patches, expected.to(dtype))


def test_the_image_index_picks_the_image():
    batch = make_images((32, 32), (32, 32))
    boxes = torch.tensor([[0.0, 0, 32, 32]] * 2)
    patches = crop_patches(batch, boxes, torch.tensor([1, 0]), (32, 32))
    torch.testing.assert_close(patches, batch.tensor.flip(0))


def test_no_patches():
    patches = crop_patches(
        make_images((8, 8)), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), (5, 7)
    )
    assert patches.shape == (0, 3, 5, 7)


def test_coordinates_by_hand_and_back():
    patch_box = torch.tensor([[10.0, 20, 110, 220]])
    box = torch.tensor([[35.0, 70, 60, 120]])
    inside = boxes_to_patch(box, patch_box, (100, 200))  # x doubled, y halved
    assert inside.tolist() == [[50, 25, 100, 50]]
    torch.testing.assert_close(boxes_from_patch(inside, patch_box, (100, 200)), box)
