"""Tests of the container of proposal masks, against hand-worked values, torch and pycocotools."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from pycocotools import mask as mask_util

from d2proposals.proposals import mask_proposals
from d2proposals.proposals.mask_proposals import ProposalMasks

WHOLE = [0.0, 0.0, 1.0, 1.0]


def make_masks(number=7, size=(14, 10), seed=0):
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randn(number, *size, generator=generator)
    corner = torch.rand(number, 2, generator=generator) * 0.7 - 0.1
    sides = torch.rand(number, 2, generator=generator) * 0.8
    return ProposalMasks(patches, torch.cat([corner, corner + sides], dim=1))


def paste_by_sampling(masks, height, width, threshold=0.5):
    """The brute-force twin: torch's grid_sample over the whole image, one mask at a time."""
    y = (torch.arange(height) + 0.5)[:, None].expand(height, width)
    x = (torch.arange(width) + 0.5)[None].expand(height, width)
    bitmaps = []
    for patch, frame in zip(masks.patches.float(), masks.frames, strict=True):
        x1, y1, x2, y2 = (frame * torch.tensor([width, height, width, height])).tolist()
        grid = torch.stack([2 * (x - x1) / (x2 - x1) - 1, 2 * (y - y1) / (y2 - y1) - 1], dim=-1)
        logits = F.grid_sample(
            patch[None, None], grid[None], padding_mode="border", align_corners=False
        )
        inside = (x >= x1) & (x < x2) & (y >= y1) & (y < y2)
        bitmaps.append((logits[0, 0].sigmoid() > threshold) & inside)
    return torch.stack(bitmaps)


def expect_rle_of_bitmaps(masks, height, width, threshold=0.5):
    bitmaps = masks.paste(height, width, threshold)
    expected = mask_util.encode(np.asfortranarray(bitmaps.permute(1, 2, 0).numpy(), np.uint8))
    assert masks.to_rle(height, width, threshold) == expected
    return bitmaps


@pytest.mark.parametrize("threshold", [0.2, 0.5])
@pytest.mark.parametrize("size", [(37, 53), (60, 8), (1, 1), (200, 300)])
def test_paste_equals_sampling_the_whole_image(size, threshold):
    masks = make_masks()
    bitmaps = masks.paste(*size, threshold)
    assert bitmaps.shape == (7, *size) and bitmaps.dtype == torch.bool
    different = (bitmaps != paste_by_sampling(masks, *size, threshold)).sum()
    # Logits within rounding of the threshold may fall to either side.
    assert different <= 1
    assert size == (1, 1) or 0 < bitmaps.float().mean() < 1


@pytest.mark.parametrize("size", [(37, 53), (53, 37), (1, 9), (9, 1), (128, 96)])
def test_encoding_is_that_of_pycocotools(size):
    expect_rle_of_bitmaps(make_masks(30), *size)


def test_chunks_and_strips_change_nothing(monkeypatch):
    masks = make_masks(30)
    whole = masks.paste(90, 70), masks.to_rle(90, 70)
    for pixels in (1, 500, 5000):
        monkeypatch.setattr(mask_proposals, "_CHUNK_PIXELS", pixels)
        assert torch.equal(masks.paste(90, 70), whole[0])
        assert masks.to_rle(90, 70) == whole[1]


def test_chunks_are_bounded(monkeypatch):
    monkeypatch.setattr(mask_proposals, "_CHUNK_PIXELS", 2000)
    masks = make_masks(50)
    pieces = list(masks._pieces(60, 80, 0.5))
    assert len(pieces) > 3 and all(piece.bitmaps.numel() <= 2000 for piece in pieces)


def test_hand_worked_bilinear_values():
    """One row of two cells over eight pixels: the logit grows from -1 to 3 between the centres.

    Pixel centres at .5 .. 7.5 are cells -.375, -.125, .125, ... 1.375, clamped to 0 .. 1; the
    logit -1 + 4 c is above 0 for c > .25 and above ln(.88 / .12) = 1.992 for c > .748.
    """
    masks = ProposalMasks(torch.tensor([[[-1.0, 3.0]]]), torch.tensor([WHOLE]))
    # Cells .375, .625, .875 and then 1, from the fourth pixel (index 3) on.
    assert masks.paste(1, 8)[0, 0].tolist() == [False] * 3 + [True] * 5
    assert masks.paste(1, 8, 0.88)[0, 0].tolist() == [False] * 5 + [True] * 3
    assert masks.paste(1, 8, 0.0).all()


def test_logits_are_resampled_before_the_threshold():
    # Midway the mean of the probabilities is .5005 and that of the logits -1.
    masks = ProposalMasks(torch.tensor([[[-9.0, 7.0]]]), torch.tensor([WHOLE]))
    assert masks.paste(1, 3)[0, 0].tolist() == [False, False, True]


@pytest.mark.parametrize("box", [(13, 9, 61, 40), (0, 0, 20, 10), (50.4, 20.6, 80, 59.7)])
def test_round_trip_of_a_rectangle_within_half_a_pixel(box):
    """A frame twice as large as the rectangle, cells finer than pixels."""
    x1, y1, x2, y2 = box
    width, height = x2 - x1, y2 - y1
    frame = torch.tensor([[x1 - width / 2, y1 - height / 2, x2 + width / 2, y2 + height / 2]])
    patches = torch.zeros(1, 400, 400)
    patches[:, 100:300, 100:300] = 1
    masks = ProposalMasks.from_binary(patches, frame / torch.tensor([80.0, 60, 80, 60]))
    bitmap = masks.paste(60, 80)[0].nonzero()
    (top, left), (bottom, right) = bitmap.amin(0).tolist(), (bitmap.amax(0) + 1).tolist()
    assert np.abs(np.subtract((left, top, right, bottom), box)).max() <= 0.51
    assert len(bitmap) == (right - left) * (bottom - top)


def test_round_trip_of_a_disc_through_a_bitmap():
    y, x = torch.meshgrid(torch.arange(48) + 0.5, torch.arange(64) + 0.5, indexing="ij")
    disc = (y - 20) ** 2 + (x - 30) ** 2 < 15**2
    frame = torch.tensor([[10 / 64, 2 / 48, 50 / 64, 42 / 48]])
    masks = ProposalMasks.from_binary(disc[None, 2:42, 10:50], frame)
    assert torch.equal(masks.paste(48, 64)[0], disc)
    # Twice the size: the outline is within half a pixel of the original image, one of this.
    y, x = torch.meshgrid(torch.arange(96) + 0.5, torch.arange(128) + 0.5, indexing="ij")
    radius = ((y - 40) ** 2 + (x - 60) ** 2).sqrt()
    large = masks.paste(96, 128)[0]
    assert large[radius < 29].all() and not large[radius > 31].any()


@pytest.mark.parametrize(
    ("frame", "expected"),
    [
        ([-0.5, -0.5, 0.5, 0.5], (0, 0, 5, 4)),
        ([0.5, 0.5, 1.5, 1.5], (5, 4, 10, 8)),
        ([-3.0, -3.0, 4.0, 4.0], (0, 0, 10, 8)),
        ([-1e30, -1e30, 1e30, 1e30], (0, 0, 10, 8)),
    ],
)
def test_frames_that_leave_the_image(frame, expected):
    masks = ProposalMasks(torch.ones(1, 3, 3), torch.tensor([frame]))
    bitmap = expect_rle_of_bitmaps(masks, 8, 10)[0]
    x1, y1, x2, y2 = expected
    assert bitmap[y1:y2, x1:x2].all() and bitmap.sum() == (x2 - x1) * (y2 - y1)


@pytest.mark.parametrize(
    "frame",
    [
        [1.2, 0, 1.5, 1],
        [0, -2.0, 1, -1],
        [0.5, 0.5, 0.5, 0.5],
        [0.6, 0.1, 0.2, 0.9],
        [float("nan"), 0, 1, 1],
        [0, 0, float("inf"), 1],
        [0.11, 0.11, 0.12, 0.12],
    ],
)
def test_frames_without_a_pixel_give_empty_masks(frame):
    others = torch.tensor([WHOLE, frame, WHOLE])
    bitmaps = expect_rle_of_bitmaps(ProposalMasks(torch.ones(3, 2, 2), others), 8, 10)
    assert bitmaps.flatten(1).sum(dim=1).tolist() == [80, 0, 80]


def test_infinite_logits():
    patches = torch.tensor([[[-torch.inf, torch.inf, torch.inf]]])
    masks = ProposalMasks(patches, torch.tensor([WHOLE]))
    assert masks.paste(1, 3)[0, 0].tolist() == [False, True, True]


def test_no_masks():
    masks = ProposalMasks(torch.zeros(0, 4, 4), torch.zeros(0, 4))
    assert masks.paste(5, 6).shape == (0, 5, 6) and masks.to_rle(5, 6) == []
    assert len(masks[torch.zeros(0, dtype=torch.bool)]) == 0
    assert len(ProposalMasks.cat([masks, make_masks(2, (4, 4))])) == 2


def test_indexing_moving_and_concatenating():
    masks = make_masks(5)
    chosen = torch.tensor([True, False, True, False, False])
    for item, expected in [(chosen, [0, 2]), (torch.tensor([4, 0]), [4, 0]), (slice(3), [0, 1, 2]),
                           (1, [1]), (-1, [4])]:  # fmt: skip
        part = masks[item]
        assert isinstance(part, ProposalMasks)
        assert torch.equal(part.patches, masks.patches[expected])
        assert torch.equal(part.frames, masks.frames[expected])
    with pytest.raises(IndexError, match="mask 5 of 5"):
        masks[5]
    assert [len(item) for item in masks] == [1] * 5
    half = masks.to(torch.float16)
    assert half.patches.dtype == torch.float16 and half.frames.dtype == torch.float32
    assert masks.to("cpu").device == torch.device("cpu") and "5 patches of 14x10" in repr(masks)
    assert (half.paste(20, 30) ^ masks.paste(20, 30)).sum() <= 3


def test_survives_instances_and_postprocessing():
    masks = make_masks(4)
    boxes = torch.tensor([[0.0, 0, 10, 10], [5, 5, 5, 9], [2, 2, 90, 50], [1, 1, 3, 3]])
    proposals = Instances(
        (60, 100),
        proposal_boxes=Boxes(boxes),
        objectness_logits=torch.arange(4.0),
        proposal_masks=masks,
    )
    joined = Instances.cat([proposals[:1], proposals[1:]]).to("cpu")
    # The second box is empty and goes.
    resized = detector_postprocess(joined, 30, 50)
    assert isinstance(resized.proposal_masks, ProposalMasks) and len(resized) == 3
    assert torch.equal(resized.proposal_masks.frames, masks.frames[[0, 2, 3]])
    expected = masks.paste(30, 50)[[0, 2, 3]]
    assert torch.equal(resized.proposal_masks.paste(*resized.image_size), expected)


def test_own_threshold_goes_with_the_masks():
    masks = make_masks(6)
    own = ProposalMasks(masks.patches, masks.frames, threshold=0.2)
    expected = masks.paste(40, 50, 0.2)
    assert expected.sum() > masks.paste(40, 50).sum()
    joined = ProposalMasks.cat([own[:2].to("cpu"), own[2:]])
    assert torch.equal(joined.paste(40, 50), expected)
    assert joined.to_rle(40, 50) == masks.to_rle(40, 50, 0.2)
    with pytest.raises(AssertionError):
        ProposalMasks.cat([own, masks])


@pytest.mark.parametrize("threshold", [-0.1, 1.0])
def test_wrong_arguments_are_named(threshold):
    with pytest.raises(ValueError, match=r"threshold of masks must be in \[0, 1\)"):
        make_masks().paste(5, 5, threshold)
    with pytest.raises(ValueError, match="at least one pixel, not 0 x 5"):
        make_masks().to_rle(0, 5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_gives_the_same_masks():
    masks = make_masks(20)
    on_gpu = masks.to("cuda")
    assert (on_gpu.paste(50, 70).cpu() ^ masks.paste(50, 70)).sum() <= 1
    assert len(on_gpu.to_rle(50, 70)) == 20
