"""Where patches are cut, against the rules of Sec. 3 and 3.4 in plain Python; and their masks."""

import math

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Boxes, ImageList, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from torch import nn

from d2proposals.data.mapper import CrowdRegions
from d2proposals.deepmask import patch_masks
from d2proposals.deepmask.generator import DeepMask
from d2proposals.deepmask.patch_masks import cut_masks
from d2proposals.deepmask.patch_sampling import PatchSampler
from d2proposals.proposals.patches import boxes_to_patch, crop_patches
from tests.common import make_instances
from tests.deepmask.deepmask_networks import build_network

# (height, width), boxes
IMAGES = [
    ((240, 320), [[20, 30, 80, 60], [100, 50, 300, 230], [105, 60, 290, 235], [5, 5, 9, 12]]),
    ((100, 400), [[-30, 20, 60, 140]]),
    ((64, 64), []),
    ((333, 200), [[0, 0, 200, 333], [90, 160, 110, 170], [150, 300, 190, 320]]),
]


def make_batch(images=IMAGES):
    return [make_instances(size, boxes) for size, boxes in images]


def sample(sampler, instances, num_positive, num_negative, seed=0, image_scales=None):
    torch.manual_seed(seed)
    ground_truth = sampler.read_ground_truth(instances, image_scales)
    return ground_truth, sampler.sample(ground_truth, num_positive, num_negative)


def canonical(box):
    """Centre and longer side of an object."""
    x1, y1, x2, y2 = box
    return (x1 + x2) / 2, (y1 + y2) / 2, max(x2 - x1, y2 - y1)


def is_negative(center, size, boxes):
    """Sec. 3.4: 32 pixels or one octave away from any canonical positive."""
    for box in boxes:
        x, y, longer = canonical(box)
        pixel = longer / 128  # of its canonical patch, in pixels of the image
        near = abs(center[0] - x) < 32 * pixel and abs(center[1] - y) < 32 * pixel
        if near and abs(math.log2(size / longer)) < 1:
            return False
    return True


def test_ten_thousand_samples_obey_the_rules():
    sampler = PatchSampler()
    instances = make_batch()
    _, samples = sample(sampler, instances, 5000, 5000)
    assert samples.is_valid.all()
    boxes = sampler.boxes(samples).tolist()
    offsets, octaves, flips = [], [], []
    for k, (x1, y1, x2, y2) in enumerate(boxes):
        size, objects = IMAGES[int(samples.image_index[k])]
        center, side = ((x1 + x2) / 2, (y1 + y2) / 2), x2 - x1
        assert y2 - y1 == pytest.approx(side, rel=1e-4)
        if k < 5000:
            flat = [box for _, boxes_i in IMAGES for box in boxes_i]
            box = flat[int(samples.object_index[k])]
            assert box in objects
            x, y, longer = canonical(box)
            # Two of the objects are shorter: they are neither.
            assert 32 <= longer <= 1024
            pixel = longer / 128
            dx, dy = (center[0] - x) / pixel, (center[1] - y) / pixel
            octave = math.log2(side / (224 * pixel))
            assert max(abs(dx), abs(dy)) <= 16.001 and abs(octave) <= 0.2501
            # (ii) fully contained in the patch
            assert box[0] >= x1 and box[1] >= y1 and box[2] <= x2 and box[3] <= y2
            offsets += [dx, dy]
            octaves.append(octave)
        else:
            assert 0 <= center[0] <= size[1] and 0 <= center[1] <= size[0]
            # One octave of -3 to 2 for each side of the range, and the jitter of positives.
            assert 224 / 2**2.2501 <= side <= 224 * 2**3.2501
            assert is_negative(center, side * 128 / 224, objects)
            assert samples.object_index[k] == -1
        flips.append(bool(samples.flipped[k]))
    # The whole range is used, evenly: the deviation of a uniform distribution.
    assert np.std(offsets) == pytest.approx(32 / 12**0.5, rel=0.03)
    assert np.std(octaves) == pytest.approx(0.5 / 12**0.5, rel=0.03)
    assert np.mean(flips) == pytest.approx(0.5, abs=0.03)
    assert torch.equal(samples.labels, torch.arange(10000).lt(5000).float())


def test_the_checker_agrees_on_places_that_are_no_negatives():
    sampler = PatchSampler()
    instances = make_batch()
    ground_truth = sampler.read_ground_truth(instances)
    torch.manual_seed(0)
    image = torch.randint(len(IMAGES), (3000,))
    center = 100 + torch.randn(3000, 2) * 80
    size = 2 ** (4 + torch.rand(3000) * 5)
    expected = [
        is_negative(center[k].tolist(), float(size[k]), IMAGES[int(image[k])][1])
        for k in range(3000)
    ]
    actual = sampler.is_negative(ground_truth, center, size, image).tolist()
    assert actual == expected
    assert 0.03 < 1 - np.mean(expected) < 0.5


@pytest.mark.parametrize(
    "center, size, expected",
    [
        ((96.0, 100.0), 64.0, False),
        ((96.0 + 15.9, 100.0), 64.0, False),
        ((96.0 + 16.0, 100.0), 64.0, True),  # 32 canonical pixels are 16 pixels
        ((96.0 - 15.9, 100.0 - 15.9), 64.0, False),
        ((96.0, 100.0 - 16.0), 64.0, True),
        ((96.0, 100.0), 127.9, False),
        ((96.0, 100.0), 128.0, True),
        ((96.0, 100.0), 32.0, True),
        ((96.0, 100.0), 32.1, False),
    ],
)
def test_the_rule_for_negatives_by_hand(center, size, expected):
    # Centre (96, 100), longer side 64.
    instances = [make_instances((200, 200), [[64, 90, 128, 110]])]
    sampler = PatchSampler()
    ground_truth = sampler.read_ground_truth(instances)
    args = torch.tensor([center]), torch.tensor([size]), torch.zeros(1, dtype=torch.int64)
    assert sampler.is_negative(ground_truth, *args).tolist() == [expected]


def test_a_negative_is_away_from_every_object():
    # Between two objects, 32 canonical pixels from neither.
    boxes = [[0, 0, 64, 64], [30, 0, 94, 64]]
    sampler = PatchSampler()
    for count, expected in ((1, True), (2, False)):
        ground_truth = sampler.read_ground_truth([make_instances((200, 200), boxes[:count])])
        args = torch.tensor([[62.0, 32.0]]), torch.tensor([64.0]), torch.zeros(1).long()
        assert sampler.is_negative(ground_truth, *args).tolist() == [expected]


def test_images_count_alike_whatever_the_number_of_their_objects():
    _, samples = sample(PatchSampler(), make_batch(), 6000, 6000)
    positives = samples.image_index[:6000].bincount(minlength=4) / 6000
    negatives = samples.image_index[6000:].bincount(minlength=4) / 6000
    assert positives.tolist() == pytest.approx([1 / 3, 1 / 3, 0, 1 / 3], abs=0.03)
    assert negatives.tolist() == pytest.approx([0.25] * 4, abs=0.03)


def test_scales_of_negatives_refer_to_the_native_size():
    sampler = PatchSampler(negative_log2_scales=(0.0, 1.0))
    instances = [make_instances((300, 300)), make_instances((300, 300), [[0, 0, 2, 2]])]
    _, samples = sample(sampler, instances, 500, 500, image_scales=[1.0, 0.5])
    boxes = sampler.boxes(samples)[500:]
    side = boxes[:, 2] - boxes[:, 0]
    first = samples.image_index[500:] == 0
    jitter = 2**0.25
    assert 112 / jitter <= side[first].min() and side[first].max() <= 224 * jitter
    assert 224 / jitter <= side[~first].min() and side[~first].max() <= 448 * jitter


def test_a_resized_image_has_the_patches_of_the_native_one():
    # Objects at each limit: area 100, shorter side 5, longer sides 32 and 1024.
    boxes = torch.tensor(
        [[0, 0, 19, 5.2], [0, 0, 40, 5], [0, 0, 40, 4.9], [0, 0, 3, 33], [0, 0, 40, 31],
         [0, 0, 32, 9], [0, 0, 31.9, 9], [10, 0, 1030, 9], [0, 0, 1026, 9]]
    )  # fmt: skip
    sampler = PatchSampler()
    results = []
    for factor in (1.0, 0.5, 3.0):
        instances = make_instances(
            (int(800 * factor), int(1200 * factor)), (boxes * factor).tolist()
        )
        results.append(sample(sampler, [instances], 40, 40, image_scales=[1 / factor]))
        ground_truth, samples = results[-1]
        assert ground_truth.is_positive.tolist() == [
            False, True, False, False, True, True, False, True, False
        ]  # fmt: skip
        areas = boxes[:, 2:].prod(dim=1) - boxes[:, 0] * boxes[:, 3]
        torch.testing.assert_close(ground_truth.areas, areas)
        torch.testing.assert_close(samples.centers / factor, results[0][1].centers)
        torch.testing.assert_close(samples.object_sizes / factor, results[0][1].object_sizes)


@pytest.mark.parametrize(
    "box, area, expected",
    [
        ((0, 0, 10, 10), None, True),
        ((0, 0, 10, 9.9), None, False),
        ((0, 0, 5, 20), None, True),
        ((0, 0, 4.9, 60), None, False),
        ((0, 0, 60, 4.9), None, False),
        ((0, 0, 40, 40), 100.0, True),  # a mask's area
        ((0, 0, 40, 40), 99.0, False),
    ],
)
def test_small_objects_are_neither(box, area, expected):
    instances = make_instances((200, 200), [[100, 100, 150, 150], box])
    instances.gt_areas = torch.tensor([2500.0, instances.gt_boxes.area()[1] if not area else area])
    sampler = PatchSampler(positives_in_scale_range=False)
    ground_truth = sampler.read_ground_truth([instances])
    assert ground_truth.is_positive.tolist() == [True, expected]
    # No negative is similar to its canonical patch either.
    x, y, longer = canonical(box)
    args = torch.tensor([[x, y]]), torch.tensor([float(longer)]), torch.zeros(1).long()
    assert sampler.is_negative(ground_truth, *args).tolist() == [False]
    everything = PatchSampler(
        positives_in_scale_range=False, min_object_area=0, min_object_side=0
    ).read_ground_truth([instances])
    assert everything.is_positive.all()


def objects_of_all_sizes(count=200):
    """Instances of squares, log-uniform from 4 to 1,600 pixels."""
    generator = torch.Generator().manual_seed(0)
    sides = 4 * 400 ** torch.rand(count, generator=generator)
    corner = torch.rand(count, 2, generator=generator) * 2000
    return make_instances((4000, 4000), torch.cat([corner, corner + sides[:, None]], 1).tolist())


def test_both_labels_occur_at_every_size_of_a_patch():
    # A small patch is enlarged to 224 pixels: its blur must not tell the label.
    instances = objects_of_all_sizes()
    sampler = PatchSampler(num_tries=8)
    _, samples = sample(sampler, [instances], 4000, 4000)
    octaves = (128 / samples.object_sizes).log2()
    assert samples.is_valid.all()
    for label in (octaves[:4000], octaves[4000:]):
        assert label.min() >= -3.2501 and label.max() <= 2.2501
        # Quarters of an octave; at either end only jitter leads there.
        assert label.histc(22, -3.25, 2.25).min() > 10
    sampler = PatchSampler(positives_in_scale_range=False, num_tries=8)
    _, samples = sample(sampler, [instances], 4000, 4000)
    octaves = (128 / samples.object_sizes).log2()
    assert (octaves[:4000] > 2).sum() > 500 and octaves[4000:].max() <= 2.0
    assert octaves[4000:].min() >= -3


def test_context_is_around_the_patch():
    sampler = PatchSampler()
    _, samples = sample(sampler, make_batch(), 10, 0)
    inner, outer = sampler.boxes(samples), sampler.boxes(samples, context=64)
    expected = torch.tensor([64.0, 64, 288, 288]).expand(10, 4)
    torch.testing.assert_close(boxes_to_patch(inner, outer, (352, 352)), expected)


@pytest.mark.parametrize("boxes", [[], [[10, 10, 10, 30]], [[5, 5, math.inf, 9]]])
def test_a_batch_without_usable_objects_has_no_valid_patches(boxes):
    # An equal number of positives and negatives: none.
    _, samples = sample(PatchSampler(), [make_instances((60, 60), boxes)] * 2, 8, 8)
    assert len(samples.is_valid) == 16 and not samples.is_valid.any()
    assert samples.centers.isfinite().all() and samples.object_sizes.gt(0).all()


def test_as_many_negatives_as_positives_are_valid():
    # The whole image is crowd: no negatives, so no positives either.
    instances = make_instances((60, 60), [[10, 10, 45, 30]])
    instances.crowd_regions = CrowdRegions(Boxes(torch.tensor([[0.0, 0, 60, 60]])), None, 1)
    _, samples = sample(PatchSampler(), [instances], 8, 8)
    assert not samples.is_valid.any()
    # Another image has room: each negative that this one has none for is drawn in that one.
    other = make_instances((60, 60), [[10, 10, 45, 30]])
    for batch in ([instances, other], [other, instances, instances]):
        _, samples = sample(PatchSampler(), batch, 50, 50)
        assert samples.is_valid.all()
        assert (samples.image_index[50:] == batch.index(other)).all()
    # Half of it is crowd.
    instances.crowd_regions = CrowdRegions(Boxes(torch.tensor([[0.0, 0, 30, 60]])), None, 1)
    _, samples = sample(PatchSampler(), [instances], 200, 200)
    assert samples.is_valid[:200].sum() == samples.is_valid[200:].sum() > 0
    assert samples.centers[200:][samples.is_valid[200:], 0].min() >= 30


def test_negatives_may_be_beside_the_mask_of_a_crowd():
    # A triangle in its box, and an image of another size without crowd.
    mask = torch.zeros(1, 50, 70, dtype=torch.bool)
    mask[0, 10:40, 20:60] = torch.ones(30, 40).triu().bool()
    instances = make_instances((50, 70), [[0, 0, 40, 40]])
    box = Boxes(torch.tensor([[20.0, 10, 60, 40]]))
    instances.crowd_regions = CrowdRegions(box, BitMasks(mask), 1)
    images = [make_instances((80, 60), [[0, 0, 40, 40]]), instances]
    for regions, masked in ((instances.crowd_regions, True), (CrowdRegions(box, None, 1), False)):
        instances.crowd_regions = regions
        ground_truth, samples = sample(PatchSampler(), images, 2000, 2000)
        assert samples.is_valid.all()
        here = samples.image_index[2000:] == 1
        x, y = samples.centers[2000:][here].floor().long().unbind(dim=1)
        crowd = mask[0] if masked else torch.zeros(50, 70).bool()
        crowd[10:40, 20:60] |= not masked
        assert not crowd[y, x].any() and ground_truth.crowd[1, :50, :70].equal(crowd)
        # Everywhere else in the image there are some, beside the mask in its box as well.
        beside = (x >= 20) & (x < 60) & (y >= 10) & (y < 40)
        assert (beside.sum() > 50) == masked
        assert not ground_truth.crowd[0].any()


@pytest.mark.parametrize("numbers", [(0, 7), (7, 0), (0, 0)])
def test_patches_of_one_label_alone(numbers):
    sampler = PatchSampler()
    _, samples = sample(sampler, make_batch(), *numbers)
    assert samples.num_positive == numbers[0] and samples.is_valid.sum() == sum(numbers)
    assert samples.labels.tolist() == [1.0] * numbers[0] + [0.0] * numbers[1]
    assert sampler.boxes(samples).shape == (sum(numbers), 4)


def with_classes(instances, classes):
    instances.gt_classes = torch.tensor(classes)
    return instances


@pytest.mark.parametrize("other", ["background", "ignored"])
def test_other_categories(other):
    boxes = [[10, 10, 60, 60], [120, 110, 160, 180]]
    instances = [with_classes(make_instances((200, 200), boxes), [3, 5])]
    sampler = PatchSampler(categories=(5, 7), other_categories=other)
    ground_truth, samples = sample(sampler, instances, 50, 50)
    assert (samples.object_index[:50] == 1).all() and samples.is_valid.all()
    args = torch.tensor([[35.0, 35.0], [140, 145]]), torch.tensor([50.0, 70.0])
    actual = sampler.is_negative(ground_truth, *args, torch.zeros(2).long()).tolist()
    assert actual == [other == "background", False]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"object_size": 200}, "must contain their object"),
        ({"jitter_shift": 40}, "must contain their object"),
        ({"other_categories": "negatives"}, "OTHER_CATEGORIES"),
        ({"object_size": 0}, "OBJECT_SIZE must be positive"),
        ({"jitter_shift": -1.0}, "JITTER_SHIFT and JITTER_SCALE must not be negative"),
        ({"negative_shift": 15.0}, "NEGATIVE_SHIFT must be at least JITTER_SHIFT 16"),
        ({"negative_scale": 0.2}, "NEGATIVE_SCALE must be at least JITTER_SCALE 0.25"),
        ({"negative_log2_scales": (2.0,)}, "NEGATIVE_LOG2_SCALES needs two numbers"),
        ({"negative_log2_scales": (2.0, -3.0)}, "NEGATIVE_LOG2_SCALES needs two numbers"),
        ({"categories": (3, -1)}, "CATEGORIES are numbers"),
        ({"min_object_area": -1.0}, "MIN_OBJECT_AREA and MIN_OBJECT_SIDE must not be negative"),
        ({"min_object_side": -1.0}, "MIN_OBJECT_AREA and MIN_OBJECT_SIDE must not be negative"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        PatchSampler(**settings)


def rectangles(size, boxes, kind):
    """Instances whose masks are rectangles, as bitmaps or polygons."""
    instances = make_instances(size, boxes)
    if kind == "polygon":
        instances.gt_masks = PolygonMasks(
            [[np.array([x1, y1, x2, y1, x2, y2, x1, y2], float)] for x1, y1, x2, y2 in boxes]
        )
        return instances
    bitmaps = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for k, (x1, y1, x2, y2) in enumerate(boxes):
        bitmaps[k, max(y1, 0) : y2, max(x1, 0) : x2] = True
    instances.gt_masks = BitMasks(bitmaps)
    return instances


@pytest.mark.parametrize("kind", ["polygon", "bitmap"])
def test_masks_are_those_of_the_centred_object_where_the_patch_shows_it(kind):
    # Two overlapping objects, one at the border, and one image of another size.
    images = [
        rectangles((200, 240), [[20, 30, 120, 90], [60, 50, 220, 130], [0, 150, 40, 200]], kind),
        rectangles((90, 70), [[10, 20, 60, 50]], kind),
    ]
    sampler = PatchSampler()
    ground_truth, samples = sample(sampler, images, 60, 60)
    boxes = sampler.boxes(samples)
    masks = cut_masks(images, ground_truth, samples, boxes, 224)
    assert masks.shape == (120, 224, 224) and set(masks.unique().tolist()) == {0.0, 1.0}
    assert masks[60:].sum() == 0 and samples.flipped[:60].any()
    inside = boxes_to_patch(
        ground_truth.boxes[samples.object_index[:60]], boxes[:60], (224, 224)
    ).tolist()
    for mask, flipped, (x1, y1, x2, y2) in zip(masks, samples.flipped, inside, strict=False):
        mask = mask.flip(-1) if flipped else mask
        rows, columns = mask.any(dim=1).nonzero()[:, 0], mask.any(dim=0).nonzero()[:, 0]
        found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        # pycocotools rounds outlines of polygons to pixels.
        tolerance = 1.01 if kind == "polygon" else 0.51
        assert [int(v) for v in found] == pytest.approx([x1, y1, x2, y2], abs=tolerance)
        # A full rectangle, but for the corners of a bitmap that is resampled.
        assert 0 <= len(rows) * len(columns) - mask.sum() <= 16


@pytest.mark.parametrize("chunk", [1, 2**24])
def test_bitmaps_are_copied_once_however_many_patches_show_them(chunk, monkeypatch):
    images = [
        rectangles((60, 80), [[4, 5, 30, 40], [20, 10, 70, 50], [30, 0, 80, 60]], "bitmap"),
        rectangles((60, 80), [], "bitmap"),
        rectangles((50, 40), [[3, 3, 20, 44]], "bitmap"),
    ]
    sampler = PatchSampler()
    ground_truth, samples = sample(sampler, images, 40, 40)
    boxes = sampler.boxes(samples)
    copied = []

    def record(bitmaps, *args):
        copied.append(len(bitmaps))
        return crop_patches(bitmaps, *args)

    monkeypatch.setattr(patch_masks, "crop_patches", record)
    monkeypatch.setattr(patch_masks, "_CHUNK_PIXELS", chunk)
    masks = cut_masks(images, ground_truth, samples, boxes, 28)
    assert copied == ([1, 1, 1, 1] if chunk == 1 else [3, 1])
    for k in range(40):
        instances = images[samples.image_index[k]]
        number = ground_truth.number_in_image[samples.object_index[k]]
        bitmap = ImageList.from_tensors([instances.gt_masks.tensor[number][None].float()])
        expected = crop_patches(
            bitmap, boxes[k : k + 1], torch.zeros(1).long(), (28, 28), samples.flipped[k : k + 1]
        )
        assert torch.equal(masks[k], (expected[0, 0] >= 0.5).float())
    assert masks[40:].sum() == 0


def test_masks_at_another_resolution_and_mirrored():
    # An L: the mirrored mask is not the mask.
    instances = make_instances((64, 64), [[16, 16, 48, 48]])
    bitmap = torch.zeros(1, 64, 64, dtype=torch.bool)
    bitmap[0, 16:48, 16:24] = bitmap[0, 40:48, 16:48] = True
    instances.gt_masks = BitMasks(bitmap)
    sampler = PatchSampler(jitter_shift=0, jitter_scale=0)
    ground_truth, samples = sample(sampler, [instances], 2, 0)
    samples.flipped = torch.tensor([False, True])
    masks = cut_masks([instances], ground_truth, samples, sampler.boxes(samples), 28)
    expected = torch.zeros(28, 28)  # 2 pixels a cell, the patch begins at (4, 4)
    expected[6:22, 6:10] = expected[18:22, 6:22] = 1
    assert torch.equal(masks[0], expected) and torch.equal(masks[1], expected.flip(-1))


def test_pixels_and_masks_of_a_patch_show_the_same():
    # Bright where the object is: the cut pixels, thresholded, are the cut mask.
    torch.manual_seed(0)
    size, boxes = (120, 150), [[20, 30, 90, 80], [100, 60, 150, 120]]
    instances = rectangles(size, boxes, "bitmap")
    image = instances.gt_masks.tensor.any(dim=0).float().expand(3, -1, -1)
    network = build_network(patch_size=224, context=16)
    generator = DeepMask(
        network=network, pixel_normalization=nn.Identity(), sampler=PatchSampler(),
        batch_size_per_image=12, branches="joint",
    )  # fmt: skip
    with EventStorage():
        patches = generator.label_and_sample_patches(ImageList.from_tensors([image]), [instances])
    pixels = patches.pixels[:6, 0, 16:-16, 16:-16]
    assert patches.samples.flipped[:6].any() and not patches.samples.flipped[:6].all()
    for pixel, mask in zip(pixels, patches.masks, strict=True):
        shown = (pixel > 0.5) & (mask > 0)
        # The other object may be in the pixels, never in the mask.
        assert shown.sum() > 0.98 * mask.sum()
    assert patches.pixels.shape == (12, 3, 256, 256) and patches.masks.shape == (6, 224, 224)


def test_masks_that_are_missing_or_unknown():
    sampler = PatchSampler()
    instances = Instances((60, 60), gt_boxes=Boxes(torch.tensor([[10.0, 10, 50, 30]])))
    ground_truth, samples = sample(sampler, [instances], 4, 0)
    with pytest.raises(ValueError, match="INPUT.USE_INSTANCE_MASK True, and take a dataset"):
        cut_masks([instances], ground_truth, samples, sampler.boxes(samples), 56)
    instances.gt_masks = torch.zeros(1, 60, 60)
    with pytest.raises(ValueError, match="INPUT.MASK_FORMAT"):
        cut_masks([instances], ground_truth, samples, sampler.boxes(samples), 56)
