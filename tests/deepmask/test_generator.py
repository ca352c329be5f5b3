"""The generator DeepMask: its losses' bookkeeping, and from masks to proposals."""

import math
import subprocess
import sys

import pytest
import torch
from detectron2.modeling import build_model, build_proposal_generator
from detectron2.structures import BitMasks, ImageList, pairwise_iou
from detectron2.utils.events import EventStorage
from torch import nn

from d2proposals.deepmask import DeepMask
from d2proposals.deepmask import generator as generator_module
from d2proposals.deepmask.mask_boxes import boxes_of_masks
from d2proposals.deepmask.patch_sampling import PatchSampler
from d2proposals.deepmask.trunk_maps import TrunkMaps
from d2proposals.proposals.mask_proposals import ProposalMasks
from d2proposals.proposals.native_size import NativeSizes
from tests.common import CONFIGS, make_cfg, make_images, make_instances
from tests.deepmask.deepmask_networks import build_network

BOXES = [[10, 20, 70, 60], [50, 10, 90, 90]]


def build_generator(network=None, sampler=None, **settings):
    network = network or build_network(patch_size=64)
    sampler = sampler or PatchSampler(
        patch_size=64, object_size=36, jitter_shift=4, negative_shift=9
    )
    defaults = {"log2_scales": (0.0,), "pre_nms_topk": (50, 50)}
    return DeepMask(
        network=network, pixel_normalization=nn.Identity(), sampler=sampler, **defaults | settings
    )


def make_batch(*boxes_of_images, size=(100, 120)):
    instances = [make_instances(size, boxes) for boxes in boxes_of_images]
    for x in instances:
        masks = torch.zeros(len(x), *size, dtype=torch.bool)
        for mask, box in zip(masks, x.gt_boxes.tensor.long().tolist(), strict=True):
            mask[box[1] : box[3], box[0] : box[2]] = True
        x.gt_masks = BitMasks(masks)
    return make_images(*[size] * len(boxes_of_images), divisibility=16), instances


def train_step(generator, images, instances, iteration=0):
    generator.train().zero_grad(set_to_none=True)
    with EventStorage(iteration) as storage:
        proposals, losses = generator(images, {}, instances)
        sum(losses.values()).backward()
        return proposals, losses, storage


def has_gradient(module):
    gradients = [p.grad for p in module.parameters()]
    assert all(gradient is not None for gradient in gradients)
    return any(gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.parametrize("shared", [True, False])
def test_branches_alternate_and_the_idle_one_stays_connected(shared):
    network = build_network(patch_size=64, shared=shared)
    generator = build_generator(network)
    for iteration in (0, 1, 2, 7):
        torch.manual_seed(0)
        _, losses, _ = train_step(generator, *make_batch(BOXES, BOXES[:1]), iteration)
        mask, score = losses["loss_deepmask_mask"], losses["loss_deepmask_score"]
        trains_mask = iteration % 2 == 0
        assert (mask > 0) == trains_mask and (score > 0) != trains_mask
        assert has_gradient(network.mask_head) == trains_mask
        assert has_gradient(network.score_head) != trains_mask
        assert has_gradient(network.trunk) == (trains_mask or shared)
        if not shared:
            assert has_gradient(network.score_trunk) != trains_mask


@pytest.mark.parametrize("shared", [True, False])
def test_joint_training_reaches_both_branches(shared):
    network = build_network(patch_size=64, shared=shared)
    _, losses, storage = train_step(build_generator(network, branches="joint"), *make_batch(BOXES))
    assert all(loss > 0 for loss in losses.values())
    assert has_gradient(network.mask_head) and has_gradient(network.score_head)
    assert storage.latest()["deepmask/num_pos_patches"][0] == 2
    assert storage.latest()["deepmask/num_neg_patches"][0] == 2


@pytest.mark.parametrize(
    "branches, iteration, numbers",
    [("alternating", 0, (12, 0)), ("alternating", 1, (6, 6)), ("joint", 0, (6, 6))],
)
def test_numbers_of_patches(branches, iteration, numbers):
    generator = build_generator(batch_size_per_image=4, branches=branches)
    with EventStorage(iteration):
        patches = generator.label_and_sample_patches(*make_batch(BOXES, [], BOXES))
    assert patches.pixels.shape == (12, 3, 64, 64)
    assert patches.samples.num_positive == numbers[0]
    assert patches.samples.is_valid.sum() == 12
    assert len(patches.masks) == (0 if iteration else numbers[0])


def test_an_odd_number_of_patches_has_a_positive_more():
    generator = build_generator(batch_size_per_image=5, branches="joint")
    with EventStorage():
        patches = generator.label_and_sample_patches(*make_batch(BOXES))
    assert (len(patches.pixels), patches.samples.num_positive) == (6, 3)


def test_losses_are_those_of_equation_1():
    generator = build_generator(branches="joint", batch_size_per_image=6).eval()
    generator.loss_weight = {"loss_deepmask_mask": 3.0, "loss_deepmask_score": 3.0 / 32}
    torch.manual_seed(0)
    with EventStorage(), torch.no_grad():
        patches = generator.label_and_sample_patches(*make_batch(BOXES))
        patches.samples.is_valid[1] = False
        losses = generator.losses(patches)
        masks = generator.network.mask_head.enlarge(generator.network.mask_logits(patches.pixels))
        scores = generator.network.score_logits(patches.pixels)
    mask_sum = score_sum = 0.0
    for k in (0, 2, 3, 4, 5):
        y = 1 if k < 3 else -1
        score_sum += math.log(1 + math.exp(-y * scores[k]))
        if y == 1:
            m = patches.masks[k] * 2 - 1
            mask_sum += float(torch.log(1 + torch.exp(-m * masks[k])).mean())
    assert losses["loss_deepmask_mask"].item() == pytest.approx(3 * mask_sum, rel=1e-4)
    assert losses["loss_deepmask_score"].item() == pytest.approx(3 * score_sum / 32, rel=1e-4)


def test_the_sum_over_all_processes_is_what_their_mean_gradient_is_of(monkeypatch):
    generator = build_generator(branches="joint").eval()
    with EventStorage():
        patches = generator.label_and_sample_patches(*make_batch(BOXES))
        alone = generator.losses(patches)
        monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 4)
        for name, loss in generator.losses(patches).items():
            torch.testing.assert_close(loss, 4 * alone[name])


@pytest.mark.parametrize("iteration", [0, 1])
def test_masks_learnt_from_negatives_are_empty(iteration):
    generator = build_generator(mask_loss_on_negatives=True, batch_size_per_image=8)
    with EventStorage(iteration):
        patches = generator.label_and_sample_patches(*make_batch(BOXES))
    assert patches.samples.num_positive == 4 and len(patches.pixels) == 8
    if iteration == 0:
        assert len(patches.masks) == 8
        assert patches.masks[:4].flatten(1).any(dim=1).all() and patches.masks[4:].sum() == 0
        generator.eval()
        only_positives = generator.losses(patches)["loss_deepmask_mask"]
        patches.samples.is_valid[4:] = False
        assert generator.losses(patches)["loss_deepmask_mask"] < only_positives


@pytest.mark.parametrize("upsampling, side", [("bilinear", 64), ("trainable", 64), ("none", 16)])
def test_up_sampling_decides_at_which_resolution_masks_are_learnt(upsampling, side):
    network = build_network(patch_size=64, upsampling=upsampling)
    generator = build_generator(network)
    images, instances = make_batch(BOXES)
    with EventStorage():
        assert generator.label_and_sample_patches(images, instances).masks.shape == (4, side, side)
    _, losses, _ = train_step(generator, images, instances)
    assert losses["loss_deepmask_mask"] > 0 and has_gradient(network.mask_head)
    with torch.no_grad():
        (proposals,), _ = generator.eval()(images, {})
    # A learnt up-sampling is part of the masks.
    assert proposals.proposal_masks.patches.shape[1] == (64 if upsampling == "trainable" else 16)


@pytest.mark.parametrize("boxes", [[[]], [[], []], [[], BOXES], [[[5, 5, 6, 90]], [[3, 3, 4, 4]]]])
@pytest.mark.parametrize("branches", ["joint", "alternating"])
def test_training_is_finite_whatever_the_objects(boxes, branches):
    for iteration in (0, 1):
        generator = build_generator(branches=branches)
        _, losses, _ = train_step(generator, *make_batch(*boxes), iteration)
        assert all(loss.isfinite() for loss in losses.values())
        assert all(p.grad.isfinite().all() for p in generator.parameters())
        if not any(boxes):
            assert all(loss == 0 for loss in losses.values())


def test_objects_without_masks():
    images, instances = make_batch(BOXES)
    instances[0].remove("gt_masks")
    with pytest.raises(ValueError, match="INPUT.USE_INSTANCE_MASK"):
        train_step(build_generator(), images, instances)


@torch.no_grad()
def test_an_image_has_the_same_proposals_alone_and_in_a_batch():
    generator = build_generator(log2_scales=(-0.5, 0.0, 0.5)).eval()
    batch = make_images((75, 100), (128, 96), divisibility=32)
    alone = make_images((75, 100), divisibility=0)
    torch.testing.assert_close(alone[0], batch[0])
    (first, _), _ = generator(batch, {})
    (only,), _ = generator(alone, {})
    assert len(first) == len(only) > 10
    assert torch.equal(first.proposal_boxes.tensor, only.proposal_boxes.tensor)
    assert torch.equal(first.objectness_logits, only.objectness_logits)
    assert torch.equal(first.proposal_masks.patches, only.proposal_masks.patches)


@torch.no_grad()
@pytest.mark.parametrize("size", [(100, 120), (40, 50), (3, 90)])
@pytest.mark.parametrize("threshold", [0.2, 0.5])
def test_boxes_are_those_around_the_masks_pasted_into_the_image(size, threshold):
    # At scale 1 the pixels of patch and image are the same: no half pixel of doubt. Windows reach
    # beyond the image's borders, and all around the small image.
    network = build_network(patch_size=64)
    network.mask_head.classify.weight *= 30
    network.mask_head.classify.bias -= 1
    generator = build_generator(network, mask_thresh=threshold, pre_nms_topk=(1, 1000)).eval()
    (proposals,), _ = generator(make_images(size, divisibility=0), {})
    bitmaps = proposals.proposal_masks.paste(*size, threshold=threshold)
    assert len(proposals) > 0
    # Which the masks have themselves, for whoever pastes them.
    assert torch.equal(proposals.proposal_masks.paste(*size), bitmaps)
    for box, bitmap in zip(proposals.proposal_boxes.tensor, bitmaps, strict=True):
        rows, columns = bitmap.any(dim=1).nonzero()[:, 0], bitmap.any(dim=0).nonzero()[:, 0]
        expected = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        assert box.tolist() == pytest.approx([float(x) for x in expected], abs=1e-3)
    areas = bitmaps.flatten(1).sum(dim=1)
    assert areas.min() < areas.max()


@torch.no_grad()
@pytest.mark.parametrize("scale", [0.25, 0.6, 1.9])
def test_a_patch_s_square_comes_back_at_every_scale(scale):
    # The mask is the central quarter of each window; its box is known.
    network = build_network(patch_size=64)
    nn.init.zeros_(network.mask_head.classify.weight)
    square = torch.full((16, 16), -5.0)
    square[4:12, 4:12] = 5.0
    network.mask_head.classify.bias.copy_(square.flatten())
    height, width = 150, 210
    generator = build_generator(
        network, log2_scales=(math.log2(scale),), mask_thresh=0.5, pre_nms_topk=(1, 10**4)
    ).eval()
    (proposals,), _ = generator(make_images((height, width), divisibility=0), {})
    frames = proposals.proposal_masks.frames * torch.tensor([width, height, width, height])
    center = (frames[:, :2] + frames[:, 2:]) / 2
    half = 16 / scale
    expected = torch.cat([center - half, center + half], dim=1)
    expected[:, 0::2].clamp_(0, width)
    expected[:, 1::2].clamp_(0, height)
    # Half a pixel of the scaled image, and what rounding its size to pixels makes of the scale.
    tolerance = 0.5 / scale + 0.01 * half
    torch.testing.assert_close(proposals.proposal_boxes.tensor, expected, atol=tolerance, rtol=0)
    assert len(proposals) > 3


def test_boxes_of_masks_by_hand():
    logits = torch.full((4, 4, 4), -9.0)
    logits[0, 1, 2] = 9.0
    logits[1, 0, 0] = logits[1, 3, 1] = 9.0
    logits[3, 0, :] = 9.0  # above the image
    frames = torch.tensor([[0.0, 0, 1, 1], [-0.5, 0.5, 0.5, 1.5], [0, 0, 1, 1], [0, -0.5, 1, 0.5]])
    boxes, kept = boxes_of_masks(logits, frames, 0.5, lambda x: x)
    assert boxes[0].tolist() == [0.5, 0.25, 0.75, 0.5]
    # Both cells of the second are outside: it begins at x = -.5 and ends at y = 1.5.
    assert boxes[1:].isnan().all()
    assert kept is logits
    logits[1, 1, 2:] = 9.0

    def double(x):
        return x.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)

    boxes, kept = boxes_of_masks(logits, frames, 0.5, double, True)
    assert boxes[1].tolist() == [0.0, 0.75, 0.5, 1.0]
    assert kept.shape == (4, 8, 8)
    assert boxes_of_masks(logits[:0], frames[:0], 0.5, lambda x: x)[0].shape == (0, 4)


@torch.no_grad()
def test_empty_masks_are_dropped():
    network = build_network(patch_size=64)
    generator = build_generator(network).eval()
    nn.init.constant_(network.mask_head.classify.bias, -50)
    (proposals,), _ = generator(make_images((80, 80)), {})
    assert len(proposals) == 0 and len(proposals.proposal_masks) == 0
    assert proposals.proposal_boxes.tensor.shape == (0, 4)


@torch.no_grad()
def test_the_best_windows_are_proposed_in_their_order_up_to_the_limit():
    generator = build_generator(log2_scales=(0.0, 1.0), pre_nms_topk=(1, 30), post_nms_topk=(1, 7))
    (proposals,), _ = generator.eval()(make_images((80, 80)), {})
    assert len(proposals) == 7
    assert (proposals.objectness_logits.diff() <= 0).all()
    generator.post_nms_topk[False] = 1000
    (more,), _ = generator(make_images((80, 80)), {})
    assert 7 < len(more) <= 30
    assert torch.equal(more.objectness_logits[:7], proposals.objectness_logits)


@torch.no_grad()
def test_nms_is_off_by_default_and_leaves_distinct_boxes_when_on():
    generator = build_generator(log2_scales=(0.0, 0.5), pre_nms_topk=(1, 200)).eval()
    images = make_images((90, 90))
    (everything,), _ = generator(images, {})
    generator.nms_thresh = 0.5
    (distinct,), _ = generator(images, {})

    def overlap(x):
        iou = pairwise_iou(x.proposal_boxes, x.proposal_boxes)
        return float((iou - torch.eye(len(x))).max())

    assert overlap(everything) > 0.5 >= overlap(distinct)
    assert distinct.objectness_logits[0] == everything.objectness_logits[0]
    assert 1 < len(distinct) < len(everything)


@torch.no_grad()
def test_scores_are_clamped_logits():
    network = build_network(patch_size=64)
    network.score_head.fc3.weight *= 1e6
    (proposals,), _ = build_generator(network).eval()(make_images((90, 90)), {})
    limit = math.log((1 - 1e-6) / 1e-6)
    assert proposals.objectness_logits.abs().max().item() == pytest.approx(limit)


def test_proposals_in_training_are_those_of_evaluation_without_masks():
    torch.manual_seed(0)
    cfg = make_cfg("shapes/deepmask_rpn_only.yaml", "MODEL.DEEPMASK.LOG2_SCALES", (0.0,),
                   "MODEL.PROPOSAL_GENERATOR.PROPOSALS_IN_TRAINING", True)  # fmt: skip
    generator = build_proposal_generator(cfg, {}).train()
    images, instances = make_batch(BOXES)
    with EventStorage():
        generator(images, {}, instances)  # batch statistics that are not the initial ones
        before = {k: v.clone() for k, v in generator.state_dict().items() if "running" in k}
        with torch.no_grad():
            proposals = generator.predict_proposals(images)[0]
    assert all(torch.equal(v, generator.state_dict()[k]) for k, v in before.items())
    assert all(module.training for module in generator.modules())
    assert set(proposals.get_fields()) == {"proposal_boxes", "objectness_logits"}
    with torch.no_grad():
        (expected,), _ = generator.eval()(images, {})
    assert isinstance(expected.proposal_masks, ProposalMasks)
    assert torch.equal(proposals.proposal_boxes.tensor, expected.proposal_boxes.tensor)
    assert torch.equal(proposals.objectness_logits, expected.objectness_logits)


def test_training_that_has_diverged_is_reported():
    network = build_network(patch_size=64)
    nn.init.constant_(network.score_head.fc3.bias, math.nan)
    generator = build_generator(network)
    with pytest.raises(FloatingPointError, match="diverged"):
        generator.train().predict_proposals(make_images((64, 64)))
    with torch.no_grad():
        (proposals,), _ = generator.eval()(make_images((64, 64)), {})
    assert len(proposals) == 0


def test_scales_refer_to_the_native_size(monkeypatch):
    seen = []

    def record(network, normalization, image, scales, topk):
        seen.append((tuple(image.shape[1:]), scales))
        raise StopIteration

    monkeypatch.setattr(generator_module, "predict_windows", record)
    for edge, expected in ((0, [0.5, 2.0]), (240, [1.0, 4.0])):
        sizes = NativeSizes("MODEL.DEEPMASK", short_edge=edge)
        generator = build_generator(log2_scales=(-1.0, 1.0), native_sizes=sizes).eval()
        with pytest.raises(StopIteration):
            generator(make_images((160, 120), (300, 300)), {})
        assert seen.pop() == ((160, 120), pytest.approx(expected))


def test_pixels_are_converted_for_the_trunk_in_training_and_inference(monkeypatch):
    # All of a canvas goes through the trunk.
    monkeypatch.setattr(TrunkMaps, "_knows_border", lambda self, canvas: False)
    seen = []
    cfg = make_cfg("shapes/deepmask_rpn_only.yaml", "INPUT.FORMAT", "BGR",
                   "MODEL.PIXEL_MEAN", [103.53, 116.28, 123.675],
                   "MODEL.PIXEL_STD", [1.0, 1.0, 1.0])  # fmt: skip
    generator = build_proposal_generator(cfg, {})
    generator.network.trunk.register_forward_pre_hook(lambda m, x: seen.append(x[0].detach()))
    images = ImageList.from_tensors([torch.tensor([30.0, 20, 10])[:, None, None].expand(3, 99, 99)])
    _, instances = make_batch([[40, 40, 60, 60]], size=(99, 99))
    expected = torch.tensor([10 / 58.395, 20 / 57.12, 30 / 57.375])[:, None, None]
    with EventStorage():
        generator.train()(images, {}, instances)
    with torch.no_grad():
        generator.eval()(images, {})
    # All of a training patch of an object in the middle is image; in inference there is a border.
    torch.testing.assert_close(seen[0][0, :, 40:70, 40:70], expected.expand(3, 30, 30))
    for canvas in seen[-3:]:
        middle = canvas[0, :, canvas.shape[2] // 2, canvas.shape[3] // 2]
        torch.testing.assert_close(middle, expected[:, 0, 0])
        assert canvas[0, :, 0, 0].abs().max() < 1e-5


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"branches": "both"}, "BRANCHES"),
        ({"mask_thresh": 0.0}, "MASK_THRESH"),
        ({"log2_scales": ()}, "LOG2_SCALES"),
        ({"batch_size_per_image": 0}, "BATCH_SIZE_PER_IMAGE"),
        ({"nms_thresh": -1.0}, "NMS_THRESH"),
        ({"nms_thresh": 1.5}, "NMS_THRESH"),
        ({"pre_nms_topk": (10, 0)}, "PRE_NMS_TOPK_TRAIN and PRE_NMS_TOPK_TEST"),
        ({"post_nms_topk": (-1, 10)}, "POST_NMS_TOPK_TRAIN and POST_NMS_TOPK_TEST"),
    ],
)
def test_settings_that_make_no_sense(overrides, message):
    with pytest.raises(ValueError, match=f"MODEL.DEEPMASK.{message}"):
        build_generator(**overrides)


def test_categories_that_the_training_set_does_not_have():
    cfg = make_cfg("shapes/deepmask_rpn_only.yaml", "DATASETS.TRAIN", ("coco_2017_train",),
                   "MODEL.DEEPMASK.CATEGORIES", (79, 80, 500))  # fmt: skip
    with pytest.raises(ValueError, match=r"\[80, 500\], but coco_2017_train has .* 0 to 79"):
        build_proposal_generator(cfg, {})
    # Nothing is known of the classes of a data set that is not registered.
    cfg.DATASETS.TRAIN = ("not_registered",)
    build_proposal_generator(cfg, {})


@pytest.mark.parametrize("upsampling", ["bilinear", "trainable"])
def test_training_and_evaluation_under_autocast(upsampling):
    network = build_network(patch_size=64, upsampling=upsampling)
    generator = build_generator(network, branches="joint", proposals_in_training=True)
    images, instances = make_batch(BOXES, BOXES[:1])
    with torch.autocast("cpu", torch.bfloat16):
        proposals, losses, _ = train_step(generator, images, instances)
        with torch.no_grad():
            evaluated, _ = generator.eval()(images, {})
    for loss in losses.values():
        assert loss > 0 and loss.isfinite() and loss.dtype == torch.float32
    for x in proposals + evaluated:
        assert len(x) > 0
        assert x.proposal_boxes.tensor.dtype == x.objectness_logits.dtype == torch.float32
    for x in evaluated:
        assert x.proposal_masks.patches.dtype == torch.float32
        assert x.proposal_masks.frames.dtype == torch.float32


@pytest.mark.parametrize("branches", ["alternating", "joint"])
def test_losses_are_logged_in_the_iterations_that_train_their_branch(branches):
    generator = build_generator(branches=branches)
    for iteration in (0, 1):
        _, losses, storage = train_step(generator, *make_batch(BOXES), iteration)
        logged = {k: v[0] for k, v in storage.latest().items() if k.endswith("_loss")}
        expected = {
            f"deepmask/{name}_loss": losses[f"loss_deepmask_{name}"].item()
            for k, name in enumerate(("mask", "score"))
            if branches == "joint" or iteration == k
        }
        assert logged == pytest.approx(expected) and all(logged.values())


def test_the_default_weight_of_the_score_is_the_paper_s_lambda():
    generator = build_generator(branches="joint").eval()
    with EventStorage(), torch.no_grad():
        patches = generator.label_and_sample_patches(*make_batch(BOXES))
        default = generator.losses(patches)
        generator.loss_weight = {}
        ones = generator.losses(patches)
    torch.testing.assert_close(default["loss_deepmask_mask"], ones["loss_deepmask_mask"])
    torch.testing.assert_close(default["loss_deepmask_score"], ones["loss_deepmask_score"] / 32)


@pytest.mark.parametrize("size", [(1, 1), (5, 300), (17, 16), (64, 64)])
def test_images_of_any_size(size):
    cfg = make_cfg("shapes/deepmask_rpn_only.yaml")
    model = build_model(cfg).eval()
    image = torch.randint(0, 256, (3, *size)).float()
    with torch.no_grad():
        output = model([{"image": image, "height": 2 * size[0], "width": 3 * size[1]}])[0]
    proposals = output["proposals"]
    assert proposals.image_size == (2 * size[0], 3 * size[1])
    assert proposals.proposal_masks.paste(*proposals.image_size).shape[0] == len(proposals)


PEAK = """
import resource, sys, torch
from detectron2.modeling import build_model
from tests.common import make_cfg
torch.set_num_threads(1)
height, width, *scales = sys.argv[1:]
scales = ["MODEL.DEEPMASK.LOG2_SCALES", tuple(float(x) for x in scales)] if scales else []
model = build_model(make_cfg("deepmask_rpn_only.yaml", *scales)).eval()
with torch.no_grad():
    model([{"image": torch.rand(3, int(height), int(width)) * 255}])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak(*arguments):
    """GiB of a process that proposes on one image: its height and width, and octaves."""
    output = subprocess.run(
        [sys.executable, "-c", PEAK, *(str(x) for x in arguments)],
        capture_output=True, text=True, check=True, cwd=CONFIGS.parent,
    )  # fmt: skip
    gibibytes = int(output.stdout.split()[-1]) / 2**20
    print(f"peak of {arguments}: {gibibytes:.2f} GiB")
    return gibibytes


@pytest.mark.slow
def test_memory_of_a_large_image_at_full_size_is_bounded():
    # At scale 1, larger than all scales of usual images. 4000 x 3000 pixels take .15 GiB more.
    assert peak(2250, 3000, 0.0) < 2.6
