"""SPOP as a whole: the path from maps to proposals, its losses, its variants."""

import functools
import math
import threading
from contextlib import contextmanager

import pytest
import torch
from detectron2.modeling import build_model, build_proposal_generator
from detectron2.structures import ImageList, pairwise_iou
from detectron2.utils.events import EventStorage
from torch import nn

from d2proposals.proposals.image_pyramid import resize_image
from d2proposals.proposals.native_size import ImageSizes, given_sizes
from d2proposals.proposals.pixel_normalization import PixelNormalization
from d2proposals.spop import SPOP
from d2proposals.spop import generator as generator_module
from d2proposals.spop.networks import Confidence
from d2proposals.spop.pixel_networks import PixelNetworks
from d2proposals.spop.pixel_targets import PixelLabeler
from d2proposals.spop.superpixel_refinement import SuperpixelRefinement
from tests.common import make_cfg, make_images
from tests.spop.ablation_rows import BUILDING_BLOCKS, VARIANTS
from tests.spop.ground_truth import make_gt

STRIDE = 8
SMALL = ["MODEL.SPOP.TRUNK.WIDTH_FACTOR", 0.125, "MODEL.SPOP.HEAD_CHANNELS", 16]
BOXES = [[10, 10, 60, 70], [64, 20, 90, 52]]


def build_generator(*overrides, seed=0):
    torch.manual_seed(seed)
    generator = build_proposal_generator(make_cfg("spop_rpn_only.yaml", *SMALL, *overrides), {})
    # Untrained boxes are next to nothing and untrained scores all alike.
    for name, parameter in generator.named_parameters():
        if "trunk" not in name and parameter.dim() == 4:
            nn.init.normal_(parameter, std=0.1)
    for network in generator.networks.localization.values():
        nn.init.normal_(network.offset.weight, std=0.003)
        network.offset.bias.data = torch.tensor([-0.1, -0.1, 0.1, 0.1])
    return generator


def train_step(generator, images, gt):
    generator.train()
    with EventStorage() as storage:
        proposals, losses = generator(images, {}, gt)
        sum(losses.values()).backward()
        scalars = {name: history.latest() for name, history in storage.histories().items()}
    return proposals, losses, scalars


def make_batch(sizes=((75, 100), (64, 50)), boxes=(BOXES, BOXES[:1])):
    gt = [
        make_gt(size, b, [3000.0, 900.0][: len(b)], crowd=[[0, 0, 20, 5]])
        for size, b in zip(sizes, boxes, strict=True)
    ]
    return make_images(*sizes), gt


class PerfectTruth:
    """Boxes of an image, read at the cells of any resized copy of it."""

    def __init__(self, boxes, image_size, normalizer):
        self.boxes = torch.tensor(boxes, dtype=torch.float32)
        self.image_size = image_size
        self.normalizer = normalizer

    def read(self, x):
        """(Hm, Wm) index of each cell's box, -1 without; (M, 4) boxes in the copy's pixels."""
        height, width = x.shape[-2:]
        sy, sx = height / self.image_size[0], width / self.image_size[1]
        boxes = self.boxes * torch.tensor([sx, sy, sx, sy])
        # One row and column more than are inside, as the trunk may have.
        y = torch.arange(-(-height // STRIDE) + 1) * STRIDE
        x = torch.arange(-(-width // STRIDE) + 1) * STRIDE
        index = torch.full((len(y), len(x)), -1)
        for i, (x1, y1, x2, y2) in enumerate(boxes):
            index[((y >= y1) & (y < y2))[:, None] & ((x >= x1) & (x < x2))] = i
        return index, boxes


class PerfectConfidence(nn.Module):
    stride = STRIDE
    receptive_field = 1

    def __init__(self, truth, large_area):
        super().__init__()
        self.truth, self.large_area = truth, large_area

    def forward(self, x):
        index, _ = self.truth.read(x)
        is_object = (index >= 0).float() * 20 - 10
        side = self.truth.boxes[:, 2:] - self.truth.boxes[:, :2]
        is_large = ((side.prod(dim=1) >= self.large_area).float() * 60 - 30)[index]
        pair = [torch.stack([torch.zeros_like(z), z])[None] for z in (is_object, is_large)]
        return Confidence(*pair)


class PerfectLocalization(nn.Module):
    """Right about its own objects, wrong about the others."""

    def __init__(self, truth, knows_large, large_area):
        super().__init__()
        self.truth, self.knows_large, self.large_area = truth, knows_large, large_area
        self.normalizer = truth.normalizer

    def offsets(self, x):
        index, boxes = self.truth.read(x)
        side = self.truth.boxes[:, 2:] - self.truth.boxes[:, :2]
        known = (side.prod(dim=1) >= self.large_area) == self.knows_large
        boxes = torch.where(known[:, None], boxes, boxes + torch.tensor([0.0, 0.0, 90.0, 90.0]))
        cells = torch.stack(
            torch.meshgrid(*(torch.arange(n) * STRIDE for n in index.shape), indexing="ij")[::-1]
            * 2
        )
        return ((boxes[index].permute(2, 0, 1) - cells) / self.normalizer)[None]


def perfect_generator(boxes, image_size, *, normalizer=513.0, large_area=2000.0, **settings):
    truth = PerfectTruth(boxes, image_size, normalizer)
    pixels = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "format": "RGB"}
    networks = PixelNetworks(
        confidence=PerfectConfidence(truth, large_area),
        localization={
            "large_size": PerfectLocalization(truth, True, large_area),
            "small_size": PerfectLocalization(truth, False, large_area),
        },
        pixel_normalization=PixelNormalization(
            **{f"{side}_{k}": v for side in ("model", "trunk") for k, v in pixels.items()}
        ),
        localization_at_test=settings.pop("localization_at_test", "fused"),
    )
    labeler = PixelLabeler(stride=STRIDE, normalizer=normalizer, large_area=large_area)
    settings.setdefault("refinement", None)
    return SPOP(networks=networks, labeler=labeler, **settings).eval()


TRUE_BOXES = [[5.0, 9.5, 71.0, 60.0], [80.0, 30.0, 99.5, 61.0], [82.0, 3.0, 97.0, 22.0]]


@pytest.mark.parametrize("scales", [(1.0,), (2.0,), (1.0, 2.0), (1.37, 0.8)])
@pytest.mark.parametrize("normalizer", [513.0, 64.0])
@pytest.mark.parametrize("refine", [False, True])
def test_perfect_predictions_give_perfect_boxes_at_all_scales(scales, normalizer, refine):
    # 75 x 101 pixels: neither side a multiple of anything.
    size = (75, 101)
    generator = perfect_generator(
        TRUE_BOXES,
        size,
        normalizer=normalizer,
        scales=scales,
        refinement=SuperpixelRefinement() if refine else None,
    )
    images = ImageList.from_tensors([torch.rand(3, *size) * 255], 32)
    (proposals,), losses = generator(images, {})
    assert losses == {}
    iou = pairwise_iou(type(proposals.proposal_boxes)(torch.tensor(TRUE_BOXES)),
                       proposals.proposal_boxes)  # fmt: skip
    assert (iou.amax(dim=1) > 0.9999).all()
    # NMS leaves one initial proposal of each object; those of the background are worthless.
    objects = proposals[proposals.objectness_logits > 0]
    assert len(objects) == 3 or refine
    assert (proposals.objectness_logits.diff() < 0).all()


@pytest.mark.parametrize("name, right", [("large_size", 0), ("small_size", 1)])
def test_one_network_alone(name, right):
    generator = perfect_generator(TRUE_BOXES, (75, 101), localization_at_test=name)
    images = ImageList.from_tensors([torch.rand(3, 75, 101)], 32)
    (proposals,), _ = generator(images, {})
    iou = pairwise_iou(type(proposals.proposal_boxes)(torch.tensor(TRUE_BOXES)),
                       proposals.proposal_boxes).amax(dim=1)  # fmt: skip
    assert iou[right] > 0.9999
    assert iou[1 - right] < 0.9


def test_no_proposal_from_outside_the_image():
    # 64 x 48: 9 x 7 cells, of which the last row and column lie at pixels 64 and 48.
    generator = build_generator().eval()
    image = torch.randn(3, 48, 64)
    boxes, logits = generator._pixel_proposals(image, (48, 64))
    assert boxes.shape == (6 * 8 + 12 * 16, 4) and logits.shape == (240,)
    maps = generator.networks.predict_maps(image, (48, 64))
    assert maps.objectness.shape == maps.size.shape == (6, 8)


def test_alone_and_in_a_padded_batch():
    generator = build_generator("MODEL.SPOP.TRUNK.NORM", "GN").eval()
    torch.manual_seed(1)
    small, large = torch.randn(3, 75, 100), torch.randn(3, 130, 90)
    with torch.no_grad():
        (alone,), _ = generator(ImageList.from_tensors([small], 32), {})
        together, _ = generator(ImageList.from_tensors([large, small], 64), {})
    assert len(alone) > 10
    assert torch.allclose(alone.proposal_boxes.tensor, together[1].proposal_boxes.tensor, atol=1e-3)
    assert torch.allclose(alone.objectness_logits, together[1].objectness_logits, atol=1e-5)


def test_losses_alone_and_in_a_padded_batch():
    generator = build_generator("MODEL.SPOP.TRUNK.DROPOUT", 0.0)
    images, gt = make_batch()
    cropped = ImageList(images.tensor[:1, :, :75, :100], [(75, 100)])
    other = images.tensor.clone()
    other[0, :, 75:] = 5.0  # whatever stands in the padding
    _, first, _ = train_step(generator, ImageList(images.tensor[:1], [(75, 100)]), gt[:1])
    _, second, _ = train_step(generator, cropped, gt[:1])
    _, third, _ = train_step(generator, ImageList(other[:1], [(75, 100)]), gt[:1])
    for name, loss in first.items():
        assert loss.item() == pytest.approx(second[name].item(), rel=1e-5)
        assert loss.item() == pytest.approx(third[name].item(), rel=1e-5)


def test_limits():
    overrides = ["MODEL.SPOP.PRE_NMS_TOPK_TEST", 40, "MODEL.SPOP.POST_NMS_TOPK_TEST", 30,
                 "MODEL.SPOP.NMS_THRESH", 1.0]  # fmt: skip
    generator = build_generator(*overrides).eval()
    seen = []
    refinement = generator.refinement

    def recorded(boxes, labels):
        seen.append(len(boxes))
        return refinement(boxes, labels)

    recorded.segmented_beside = refinement.segmented_beside
    generator.refinement = recorded
    with torch.no_grad():
        (proposals,), _ = generator(make_images((75, 100)), {})
    assert seen[0] <= 40 and len(proposals) == 30


def test_scores_are_the_objectness():
    generator = build_generator(
        "MODEL.SPOP.REFINEMENT.ENABLED", False, "MODEL.SPOP.NMS_THRESH", 1.0
    ).eval()
    image = torch.randn(3, 64, 64)
    with torch.no_grad():
        (proposals,), _ = generator(ImageList.from_tensors([image]), {})
        boxes, logits = generator._pixel_proposals(image, (64, 64))
    clipped = boxes.clamp(0, 64)
    logits = logits[(clipped[:, 2:] > clipped[:, :2]).all(dim=1)].sort(descending=True).values
    assert len(proposals) == len(logits) > 100
    assert torch.allclose(proposals.objectness_logits, logits, atol=1e-4)
    assert set(proposals.get_fields()) == {"proposal_boxes", "objectness_logits"}


def test_equations_1_to_4_by_hand():
    """One 16 x 16 image of 3 x 3 cells, a large and a small object; known predictions."""
    labels = [[0, 1], [-1, 1]]  # object of each cell inside the image
    gt = make_gt((16, 16), [[0, 0, 8, 8], [8, 0, 16, 16]], [5000.0, 128.0])
    generator = build_generator()
    map_sizes = [(3, 3)]
    with EventStorage() as storage:
        targets, cells = generator.label_and_sample_pixels(map_sizes, [gt])
        assert storage.latest()["spop/num_pos_large"][0] == 1
        assert storage.latest()["spop/num_pos_small"][0] == 2
    with EventStorage() as storage:
        generator.label_and_sample_pixels(map_sizes * 2, [gt, make_gt((16, 16), [], [])])
        assert storage.latest()["spop/num_pos_small"][0] == 1  # of an image
    assert targets.object_index.view(3, 3)[:2, :2].tolist() == labels
    predictions = generator.networks(ImageList.from_tensors([torch.zeros(3, 16, 16)]))
    assert predictions.map_sizes == map_sizes
    # Every cell: probability 3/4 of an object, 1/5 of a large one.
    predictions = predictions._replace(
        objectness=torch.tensor([0.0, math.log(3)]).expand(9, 2),
        size=torch.tensor([math.log(4), 0.0]).expand(9, 2),
        coordinates={name: torch.zeros(9, 4) for name in ("large_size", "small_size")},
    )
    losses = generator.losses(predictions, targets, cells)
    # Four cells inside, three of them on an object; one of the three on a large one.
    assert losses["loss_spop_objectness"].item() == pytest.approx(
        -(3 * math.log(3 / 4) + math.log(1 / 4)) / 4
    )
    assert losses["loss_spop_size"].item() == pytest.approx(
        -(math.log(1 / 5) + 2 * math.log(4 / 5)) / 3
    )
    # Half of squared distances from 0 to (0, 0, 8, 8) and to (8, 0, 16, 16), over 513 squared.
    assert losses["loss_spop_large_size"].item() == pytest.approx(64 / 513**2)
    assert losses["loss_spop_small_size"].item() == pytest.approx(288 / 513**2)


def test_training_samples_cells_of_large_objects_for_the_size_alone(monkeypatch):
    """One large object of 64 cells and a small one of 4; three cells of a large one are wanted."""
    generator = build_generator("MODEL.SPOP.SAMPLES_PER_LARGE_OBJECT", 3)
    gt = [make_gt((64, 80), [[0, 0, 64, 64], [64, 0, 80, 16]], [4096.0, 256.0])]
    seen = {}
    two_way_loss = generator_module.two_way_loss

    def spy(logits, labels, is_trained):
        # Of the objectness the cells are a mask, of the size they are indices.
        number = is_trained.sum() if is_trained.dtype == torch.bool else len(is_trained)
        seen[is_trained.dtype] = (int(number), int(labels[is_trained].sum()))
        return two_way_loss(logits, labels, is_trained)

    monkeypatch.setattr(generator_module, "two_way_loss", spy)
    train_step(generator, make_images((64, 80)), gt)
    # (cells, of which foreground), and (cells, of which large).
    assert seen == {torch.bool: (80, 68), torch.int64: (3 + 4, 3)}


def test_pixels_are_converted_for_the_networks_and_for_the_superpixels():
    seen, segmented = [], []
    generator = build_generator(
        "INPUT.FORMAT", "BGR", "MODEL.PIXEL_MEAN", [103.53, 116.28, 123.675],
        "MODEL.PIXEL_STD", [1.0, 1.0, 1.0],
    )  # fmt: skip
    for network in (generator.networks.confidence, *generator.networks.localization.values()):
        network.trunk.register_forward_pre_hook(lambda m, x: seen.append(x[0].detach()))
    segment = generator.refinement.segment
    generator.refinement.segment = lambda image: segmented.append(image) or segment(image)
    # BGR (40, 30, 20), less the mean.
    pixels = torch.tensor([40 - 103.53, 30 - 116.28, 20 - 123.675])[:, None, None]
    images = ImageList.from_tensors([pixels.expand(3, 24, 32)])
    train_step(generator, images, [make_gt((24, 32), [[0, 0, 8, 8]], [64.0])])
    assert len(seen) == 3 and not segmented
    with torch.no_grad():
        generator.eval()(images, {})
    assert len(seen) == 3 + 2 * 3
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    expected = (torch.tensor([20.0, 30.0, 40.0]) - mean) / std
    for x in seen:
        torch.testing.assert_close(x, expected[None, :, None, None].expand_as(x))
    # RGB as it was read.
    (image,) = segmented
    assert image.dtype == torch.uint8 and image.shape == (3, 24, 32)
    assert image[:, 5, 7].tolist() == [20, 30, 40]


class Resized:
    """A batch as a detector resizes it, with what the images were: a copy of every second pixel."""

    native = [(48, 64), (40, 24)]

    def __init__(self):
        torch.manual_seed(3)
        boxes = [[[0, 0, 40, 40], [40, 8, 56, 24]], [[8, 8, 24, 32]]]
        areas = [[3000.0, 200.0], [384.0]]
        crowd = [[[56, 32, 64, 48]], []]
        small = [torch.randn(3, *size) for size in self.native]
        self.images = ImageList.from_tensors(small, 32)
        self.gt = [make_gt(*x) for x in zip(self.native, boxes, areas, crowd, strict=True)]
        # Nearest: what the resize to the native size then averages is one pixel's.
        large = [x.repeat_interleave(4, 1).repeat_interleave(4, 2) for x in small]
        self.large_images = ImageList.from_tensors(large, 32)
        self.large_gt = [
            make_gt(
                (4 * h, 4 * w), *([[4 * side for side in box] for box in b] for b in (boxes_i,)),
                areas_i, [[4 * side for side in box] for box in crowd_i],
            )
            for (h, w), boxes_i, areas_i, crowd_i in zip(
                self.native, boxes, areas, crowd, strict=True
            )
        ]  # fmt: skip
        self.sizes = [ImageSizes((4 * h, 4 * w), (h, w), (4 * h, 4 * w)) for h, w in self.native]


def test_training_at_native_size_is_training_without_the_resize(monkeypatch):
    # Exact, for the sake of the test: each pixel four times, and one of the four back.
    monkeypatch.setattr(
        generator_module, "resize_image",
        lambda image, size: image if tuple(image.shape[1:]) == size else image[:, ::4, ::4],
    )  # fmt: skip
    overrides = ("MODEL.SPOP.TRUNK.DROPOUT", 0.0)
    batch = Resized()
    plain = build_generator(*overrides)
    _, expected, counts = train_step(plain, batch.images, batch.gt)
    native = build_generator(*overrides, "MODEL.SPOP.TRAIN_AT_NATIVE_SIZE", True)
    with given_sizes(batch.sizes):
        _, losses, other_counts = train_step(native, batch.large_images, batch.large_gt)
    assert counts == other_counts and counts["spop/num_ignored"] > 0
    for name, loss in expected.items():
        assert losses[name].item() == pytest.approx(loss.item(), rel=1e-5), name
    # As it comes, otherwise: four times as many cells along a side.
    as_it_comes = build_generator(*overrides)
    with given_sizes(batch.sizes):
        _, _, other_counts = train_step(as_it_comes, batch.large_images, batch.large_gt)
    assert other_counts["spop/num_pos_large"] == 16 * counts["spop/num_pos_large"]


def test_superpixels_are_of_the_native_image_and_bounded(monkeypatch):
    generator = build_generator("MODEL.SPOP.NATIVE_LONG_EDGE", 60).eval()
    seen = []
    segment = generator.refinement.segment
    generator.refinement.segment = lambda image: seen.append(image.shape[1:]) or segment(image)
    images = make_images((96, 80), (64, 72))
    # The first was 48 x 40 and is brought back; the second came as it was, larger than the bound.
    sizes = [ImageSizes((96, 80), (48, 40), (96, 80)), ImageSizes((64, 72), (64, 72), (64, 72))]
    with given_sizes(sizes), torch.no_grad():
        proposals, _ = generator(images, {})
    assert sorted(seen) == [(48, 40), (53, 60)]
    # The refined boxes are in pixels of the input: the whole image's is among them.
    for proposals_i, size in zip(proposals, [(96, 80), (64, 72)], strict=True):
        corner = proposals_i.proposal_boxes.tensor[:, 2:].amax(dim=0)
        assert corner.tolist() == pytest.approx([size[1], size[0]])


def test_superpixels_beside_the_networks_are_those_of_before(monkeypatch):
    """The same proposals as with superpixels that are computed when they are needed."""
    generator = build_generator().eval()
    images = make_images((64, 80), (48, 40), (72, 33))
    threads = set()
    segment = generator.refinement.segment
    generator.refinement.segment = lambda image: (
        threads.add(threading.current_thread()) or segment(image)
    )
    with torch.no_grad():
        proposals, _ = generator(images, {})
    assert threading.main_thread() not in threads and threads

    @contextmanager
    def when_needed(images):
        yield [functools.partial(segment, image) for image in images]

    monkeypatch.setattr(generator.refinement, "segmented_beside", when_needed)
    with torch.no_grad():
        expected, _ = generator(images, {})
    for a, b in zip(proposals, expected, strict=True):
        assert torch.equal(a.proposal_boxes.tensor, b.proposal_boxes.tensor)
        assert torch.equal(a.objectness_logits, b.objectness_logits)


def test_initial_proposals_do_not_depend_on_the_resize_of_a_detector():
    generator = build_generator("MODEL.SPOP.TRUNK.NORM", "GN").eval()
    torch.manual_seed(2)
    size = (72, 96)
    image = resize_image(torch.randn(3, 6, 8), size)  # smooth: resizing loses nothing
    enlarged = resize_image(image, (144, 192))
    with torch.no_grad():
        boxes, logits = generator._pixel_proposals(image, size)
        other_boxes, other_logits = generator._pixel_proposals(enlarged, size)
        far_boxes, _ = generator._pixel_proposals(enlarged, (144, 192))
    # 9 x 12 and 18 x 24 cells, of the native image and twice that.
    assert len(boxes) == len(other_boxes) == 108 + 432 and len(far_boxes) > len(boxes)
    assert (other_boxes / 2 - boxes).abs().mean() < 0.2
    # Twice the native size is the enlarged image itself.
    assert torch.equal(other_boxes[108:] / 2, boxes[108:])
    assert (other_logits - logits).abs().mean() < 0.1 * logits.std()


def test_each_network_learns_of_its_own_objects_alone():
    generator = build_generator()
    images, gt = make_batch(((64, 64),), (BOXES[:1],))  # a large object
    train_step(generator, images, gt)
    localization = generator.networks.localization
    assert any(p.grad.any() for p in localization["large_size"].parameters())
    assert not any(p.grad.any() for p in localization["small_size"].parameters())


def test_loss_weights():
    images, gt = make_batch()
    weights = {"OBJECTNESS_LOSS_WEIGHT": 2.0, "SIZE_LOSS_WEIGHT": 3.0, "BBOX_REG_LOSS_WEIGHT": 5.0,
               "LOSS_WEIGHT": 0.5, "TRUNK.DROPOUT": 0.0}  # fmt: skip
    overrides = [x for key, value in weights.items() for x in (f"MODEL.SPOP.{key}", value)]
    _, plain, _ = train_step(build_generator("MODEL.SPOP.TRUNK.DROPOUT", 0.0), images, gt)
    _, weighted, _ = train_step(build_generator(*overrides), images, gt)
    ratios = {name: (weighted[name] / plain[name]).item() for name in plain}
    expected = {"objectness": 1.0, "size": 1.5, "large_size": 2.5, "small_size": 2.5}
    assert ratios == pytest.approx({f"loss_spop_{k}": v for k, v in expected.items()}, rel=1e-4)


@pytest.mark.parametrize("boxes", [([], []), (BOXES, []), ([[3, 3, 4, 4]], [[0, 0, 50, 64]])])
def test_no_objects_are_finite_and_connected(boxes):
    generator = build_generator()
    images, gt = make_batch(boxes=boxes)
    proposals, losses, _ = train_step(generator, images, gt)
    assert all(loss.isfinite() for loss in losses.values())
    assert [name for name, p in generator.named_parameters() if p.grad is None] == []
    assert [len(x) for x in proposals] == [0, 0]


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (9, 3)])
def test_tiny_images(size):
    generator = build_generator()
    images, gt = make_batch((size,), ([[0, 0, 1, 1]],))
    _, losses, _ = train_step(generator, images, gt)
    assert all(loss.isfinite() for loss in losses.values())
    with torch.no_grad():
        (proposals,), _ = generator.eval()(images, {})
    boxes = proposals.proposal_boxes.tensor
    assert proposals.image_size == size and boxes.isfinite().all()
    assert (boxes[:, 2:] <= boxes.new_tensor([size[1], size[0]])).all()


@pytest.mark.parametrize("row", [*VARIANTS.values(), *BUILDING_BLOCKS.values()],
                         ids=[*VARIANTS, *BUILDING_BLOCKS])  # fmt: skip
def test_each_variant_builds_trains_and_proposes(row):
    generator = build_generator(*row)
    images, gt = make_batch()
    _, losses, _ = train_step(generator, images, gt)
    names = {"size", "large_size", "small_size"} if generator.networks.is_scale_aware else {
        "all_sizes"}  # fmt: skip
    assert set(losses) == {f"loss_spop_{name}" for name in names | {"objectness"}}
    for name, parameter in generator.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    with torch.no_grad():
        proposals, losses = generator.eval()(images, {})
    assert losses == {} and all(len(p) for p in proposals)


def test_the_page_has_the_rows_of_the_figures():
    assert list(VARIANTS) == ["S-scale", "S-scale+SA", "M-scale+SA", "M-scale+SA+RF"]
    assert VARIANTS["M-scale+SA+RF"] == [] and len(BUILDING_BLOCKS) == 4


def test_the_single_network_learns_of_all_objects():
    generator = build_generator(*VARIANTS["S-scale"])
    for boxes, area in (([[0, 0, 64, 64]], 4096.0), ([[8, 8, 24, 24]], 256.0)):
        generator.zero_grad()
        gt = [make_gt((64, 64), boxes, [area])]
        _, losses, _ = train_step(generator, make_images((64, 64)), gt)
        assert losses["loss_spop_all_sizes"] > 0


def test_proposals_in_training_are_without_dropout():
    generator = build_generator("MODEL.PROPOSAL_GENERATOR.PROPOSALS_IN_TRAINING", True)
    images, gt = make_batch()
    proposals = [train_step(generator, images, gt)[0] for _ in range(2)]
    for a, b in zip(*proposals, strict=True):
        assert len(a) and torch.equal(a.proposal_boxes.tensor, b.proposal_boxes.tensor)
        assert set(a.get_fields()) == {"proposal_boxes", "objectness_logits"}
        assert not a.proposal_boxes.tensor.requires_grad
    assert all(module.training for module in generator.modules())


def test_every_network_is_left_in_its_own_mode():
    generator = build_generator().train()
    generator.networks.localization["large_size"].eval()
    before = {name: module.training for name, module in generator.named_modules()}
    generator.predict_proposals(make_images((40, 40)))
    assert {name: module.training for name, module in generator.named_modules()} == before
    assert set(before.values()) == {True, False}


def test_divergence_is_said():
    generator = build_generator("MODEL.PROPOSAL_GENERATOR.PROPOSALS_IN_TRAINING", True)
    nn.init.constant_(generator.networks.localization["small_size"].offset.bias, math.inf)
    images, gt = make_batch()
    with pytest.raises(FloatingPointError, match="SPOP"):
        train_step(generator, images, gt)
    with torch.no_grad():
        proposals, _ = generator.eval()(images, {})
    assert all(x.proposal_boxes.tensor.isfinite().all() for x in proposals)


def test_scales_refer_to_native_images():
    generator = build_generator("MODEL.SPOP.SCALES", (2.0,)).eval()
    # Resized from 32 to 64 pixels: scale 2 of the native image is this one.
    boxes, _ = generator._pixel_proposals(torch.randn(3, 64, 96), (32, 48))
    assert len(boxes) == 8 * 12


def test_missing_masks_are_one_clear_line():
    model = build_model(make_cfg("spop_rpn_only.yaml", *SMALL)).train()
    gt = make_gt((64, 64), [[0, 0, 20, 20]], [400.0])
    gt.remove("gt_masks")
    with EventStorage(), pytest.raises(ValueError, match="INPUT.USE_INSTANCE_MASK True"):
        model([{"image": torch.zeros(3, 64, 64), "instances": gt}])


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("LOCALIZATION", "both", "LOCALIZATION"),
        ("BBOX_REG_LOSS_TYPE", "l1", "BBOX_REG_LOSS_TYPE"),
        ("SCALES", (), "SCALES"),
        ("SCALES", (1.0, 0.0), "SCALES"),
        ("NORMALIZER", 0.0, "NORMALIZER"),
        ("TILE_SIZE", 100, "TILE_SIZE"),
        ("TRUNK.FORMAT", "GRAY", "FORMAT"),
        ("SCALES", ("a",), "MODEL.SPOP.SCALES must"),
        ("SCALES", (math.nan,), "MODEL.SPOP.SCALES must"),
        ("SCALES", (1.0, math.inf), "MODEL.SPOP.SCALES must"),
        ("NMS_THRESH", 80.0, r"MODEL.SPOP.NMS_THRESH must be in \[0, 1\], got 80"),
        ("NMS_THRESH", -0.1, "MODEL.SPOP.NMS_THRESH must"),
        ("NATIVE_SHORT_EDGE", -480, "MODEL.SPOP.NATIVE_SHORT_EDGE must"),
        ("NATIVE_LONG_EDGE", 0, "MODEL.SPOP.NATIVE_LONG_EDGE must"),
        ("SAMPLES_PER_LARGE_OBJECT", 0, "MODEL.SPOP.SAMPLES_PER_LARGE_OBJECT must"),
        ("PRE_NMS_TOPK_TRAIN", 0, "MODEL.SPOP.PRE_NMS_TOPK_TRAIN must"),
        ("PRE_NMS_TOPK_TEST", -1, "MODEL.SPOP.PRE_NMS_TOPK_TEST must"),
        ("POST_NMS_TOPK_TRAIN", 0, "MODEL.SPOP.POST_NMS_TOPK_TRAIN must"),
        ("POST_NMS_TOPK_TEST", -5, "MODEL.SPOP.POST_NMS_TOPK_TEST must"),
        ("HEAD_CHANNELS", 0, "MODEL.SPOP.HEAD_CHANNELS must"),
        ("NEW_LAYER_LR_FACTOR", 0.0, "MODEL.SPOP.NEW_LAYER_LR_FACTOR must"),
        ("TRUNK.PIXEL_STD", (1.0, 0.0, 1.0), "MODEL.SPOP.TRUNK.PIXEL_STD must"),
        ("REFINEMENT.COMPACTNESS", 0.0, "MODEL.SPOP.REFINEMENT.COMPACTNESS must"),
    ],
)
def test_values_that_are_not_allowed(key, value, message):
    with pytest.raises(ValueError, match=message) as error:
        build_generator(f"MODEL.SPOP.{key}", value)
    assert "\n" not in str(error.value)


def test_one_network_of_two_needs_two():
    with pytest.raises(ValueError, match="SCALE_AWARE True"):
        build_generator("MODEL.SPOP.SCALE_AWARE", False, "MODEL.SPOP.LOCALIZATION", "large_size")
