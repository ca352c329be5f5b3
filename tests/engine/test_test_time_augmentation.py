"""Tests of d2proposals.engine.test_time_augmentation."""

import pytest
import torch
from detectron2.modeling import DatasetMapperTTA, build_model
from detectron2.structures import Boxes, Instances
from torch import nn

from d2proposals.engine import ProposalNetworkWithTTA
from d2proposals.engine.test_time_augmentation import _augmented_sizes
from tests.common import make_cfg
from tests.engine.tiny_coco import SMALL


def small_cfg(*overrides):
    return make_cfg("shapes/rpn_only.yaml", *SMALL, *overrides)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model(small_cfg()).eval()


def make_input(height=64, width=80, original=(128, 160)):
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 255, (3, height, width), generator=generator, dtype=torch.uint8)
    return {"image": image, "height": original[0], "width": original[1]}


class Whereabouts(nn.Module):
    """A generator whose boxes are known: the left half of the image, and a corner of 1 pixel."""

    def __init__(self, with_candidates):
        super().__init__()
        self.seen, self.selections = [], []
        if with_candidates:
            self.candidates, self.select = self._candidates, self._select

    def forward(self, images, features, gt_instances=None):
        ret = []
        for boxes, scores in self._candidates(images, features):
            instances = Instances(images.image_sizes[0], proposal_boxes=Boxes(boxes))
            instances.objectness_logits = scores
            ret.append(instances)
        return ret, {}

    def _candidates(self, images, features):
        ((height, width),) = images.image_sizes
        self.seen.append(images.tensor[0, :, :height, :width])
        boxes = [[0, 0, width / 2, height], [0, 0, width / 40, height / 40], [-9, -9, -1, -1]]
        return [(torch.tensor(boxes), torch.tensor([1.0, 2.0, 3.0]) + len(self.seen))]

    def _select(self, boxes, scores, image_size):
        self.selections.append((boxes, scores, image_size))
        return Instances(image_size, proposal_boxes=Boxes(boxes), objectness_logits=scores)


def wrap(model, generator=None, *overrides):
    wrapper = ProposalNetworkWithTTA(small_cfg(*overrides), model)
    if generator is not None:
        wrapper.model = nn.Module()
        wrapper.model.backbone, wrapper.model.proposal_generator = model.backbone, generator
        wrapper.model.pixel_mean, wrapper.model.pixel_std = model.pixel_mean, model.pixel_std
        wrapper.model.device = model.device
    return wrapper


@torch.no_grad()
def test_one_scale_without_flip_equals_the_plain_network(model):
    wrapper = wrap(model, None, "TEST.AUG.MIN_SIZES", (64,))
    inputs = [make_input(), make_input(64, 64, (64, 64))]
    for x, out in zip(inputs, wrapper(inputs), strict=True):
        ((expected,), (got,)) = model([x]), [out]
        expected, got = expected["proposals"], got["proposals"]
        assert got.image_size == expected.image_size
        assert set(got.get_fields()) == {"proposal_boxes", "objectness_logits"}
        assert len(got) == len(expected) > 10
        torch.testing.assert_close(got.objectness_logits, expected.objectness_logits)
        torch.testing.assert_close(
            got.proposal_boxes.tensor, expected.proposal_boxes.tensor, atol=1e-3, rtol=1e-5
        )


@torch.no_grad()
def test_an_image_of_one_row_of_pixels(model):
    overrides = ("TEST.AUG.FLIP", True, "TEST.AUG.MAX_SIZE", 100, "INPUT.MAX_SIZE_TEST", 100)
    x = make_input(1, 4000, (1, 4000))
    generator = Whereabouts(with_candidates=True)
    wrap(model, generator, *overrides)([x])
    # Each size as it is and flipped, and no side less than a pixel.
    assert [tuple(image.shape) for image in generator.seen] == [(3, 1, 100)] * 4
    torch.testing.assert_close(generator.seen[1], generator.seen[0].flip(2))
    augmented = {"image": torch.zeros(3, 1, 100), "height": 1, "width": 4000}
    assert _augmented_sizes(augmented, (64, 100)).usual_input == (1, 100)


@torch.no_grad()
@pytest.mark.parametrize("size", [64, 32, 100])
def test_transforms_are_undone_exactly(model, size):
    """Unflipped, the left half of the image stays the left half; flipped, it is the right one."""
    generator = Whereabouts(with_candidates=True)
    wrapper = wrap(model, generator, "TEST.AUG.MIN_SIZES", (size,), "TEST.AUG.FLIP", True)
    (out,) = wrapper([make_input()])
    torch.testing.assert_close(generator.seen[1], generator.seen[0].flip(2))
    boxes = out["proposals"].proposal_boxes.tensor
    expected = torch.tensor(
        [[0, 0, 80, 128], [0, 0, 4, 3.2], [80, 0, 160, 128], [156, 0, 160, 3.2]]
    )
    torch.testing.assert_close(boxes, expected, atol=1e-4, rtol=1e-5)
    # The third box lies outside of the image.
    assert out["proposals"].objectness_logits.tolist() == [2, 3, 3, 4]


@torch.no_grad()
def test_generator_with_candidates_selects_once_over_all_scales(model):
    generator = Whereabouts(with_candidates=True)
    wrapper = wrap(model, generator, "TEST.AUG.MIN_SIZES", (32, 64, 96))
    wrapper([make_input(), make_input()])
    assert len(generator.seen) == 6
    assert [len(boxes) for boxes, _, _ in generator.selections] == [6, 6]
    assert [size for _, _, size in generator.selections] == [(128, 160)] * 2


@torch.no_grad()
def test_other_generators_are_merged_by_suppression(model):
    generator = Whereabouts(with_candidates=False)
    overrides = ("TEST.AUG.MIN_SIZES", (32, 64, 96), "TEST.AUG.FLIP", True)
    (out,) = wrap(model, generator, *overrides)([make_input()])
    # Of each of the four places, the last and best scored remains.
    assert out["proposals"].objectness_logits.tolist() == [8, 7, 7, 6]


@torch.no_grad()
def test_the_merge_is_by_the_generator_s_own_settings(model, monkeypatch):
    def merged():
        wrapper = wrap(model, Whereabouts(with_candidates=False), *overrides)
        (out,) = wrapper([make_input()])
        return out["proposals"].objectness_logits.tolist(), wrapper.nms_thresh

    overrides = ("TEST.AUG.MIN_SIZES", (32, 64, 96), "TEST.AUG.FLIP", True,
                 "MODEL.RPN.POST_NMS_TOPK_TEST", 2, "MODEL.RPN.NMS_THRESH", 0.6)  # fmt: skip
    generator = model.proposal_generator
    monkeypatch.setattr(generator, "post_nms_topk", {True: 9, False: 3})
    monkeypatch.setattr(generator, "nms_thresh", 0.99)
    assert merged() == ([8, 7, 7], 0.99)
    # No suppression would keep an object's proposals of all scales.
    monkeypatch.setattr(generator, "nms_thresh", 1.0)
    assert merged() == ([8, 7, 7], 0.6)
    # RPN's keys are for what has no settings.
    monkeypatch.delattr(generator, "post_nms_topk")
    monkeypatch.delattr(generator, "nms_thresh")
    assert merged() == ([8, 7], 0.6)


@torch.no_grad()
def test_boxes_of_a_class_are_suppressed_by_that_class_alone(model, monkeypatch):
    """As DetectorNet's, whose last suppression is another one than that of its first stage."""

    class Classes(Whereabouts):
        def forward(self, images, features, gt_instances=None):
            (proposals,), losses = super().forward(images, features)
            # The first box again, as of another class, and scored between two scales.
            again = proposals[:1]
            again.objectness_logits = again.objectness_logits + 0.5
            proposals = Instances.cat([proposals, again])
            proposals.proposal_classes = torch.tensor([4, 5, 6, 7])
            return [proposals], losses

    monkeypatch.setattr(model.proposal_generator, "nms_thresh", 0.1)
    monkeypatch.setattr(model.proposal_generator, "final_nms_thresh", 0.9, raising=False)
    wrapper = wrap(model, Classes(with_candidates=False), "TEST.AUG.MIN_SIZES", (32, 64, 96))
    assert wrapper.nms_thresh == 0.9
    (out,) = wrapper([make_input()])
    assert out["proposals"].objectness_logits.tolist() == [5, 4.5, 4]
    assert out["proposals"].proposal_classes.tolist() == [5, 7, 4]
    monkeypatch.setattr(model.proposal_generator, "final_nms_thresh", 1.0)
    assert wrap(model, None, "MODEL.RPN.NMS_THRESH", 0.6).nms_thresh == 0.6


@torch.no_grad()
def test_no_proposals(model):
    class Nothing(Whereabouts):
        def _candidates(self, images, features):
            return [(torch.zeros(0, 4), torch.zeros(0))]

    for with_candidates in (True, False):
        (out,) = wrap(model, Nothing(with_candidates), "TEST.AUG.MIN_SIZES", (32, 64))(
            [make_input()]
        )
        assert len(out["proposals"]) == 0


@torch.no_grad()
def test_proposals_are_sorted_clipped_and_not_empty(model):
    wrapper = wrap(model, None, "TEST.AUG.MIN_SIZES", (48, 96), "TEST.AUG.FLIP", True)
    (out,) = wrapper([make_input()])
    proposals = out["proposals"]
    boxes, scores = proposals.proposal_boxes.tensor, proposals.objectness_logits
    assert (scores[:-1] >= scores[1:]).all()
    assert (
        (boxes >= 0).all() and (boxes[:, [0, 2]] <= 160).all() and (boxes[:, [1, 3]] <= 128).all()
    )
    assert proposals.proposal_boxes.nonempty().all()


def test_size_defaults_to_the_images_own(model):
    with torch.no_grad():
        x = {"image": make_input()["image"]}
        (out,) = wrap(model, None, "TEST.AUG.MIN_SIZES", (64,))([x])
    assert out["proposals"].image_size == (64, 80)
    assert set(x) == {"image"}


def test_only_proposal_networks():
    cfg = small_cfg()
    with pytest.raises(ValueError, match="MODEL.META_ARCHITECTURE 'ProposalNetwork'"):
        ProposalNetworkWithTTA(cfg, nn.Linear(1, 1))


def test_explicit_constructor(model):
    cfg = small_cfg()
    wrapper = ProposalNetworkWithTTA(
        model=model, tta_mapper=DatasetMapperTTA(cfg), nms_thresh=0.7, post_nms_topk=1000
    )
    assert wrapper.training == model.training
    assert wrapper.nms_thresh == ProposalNetworkWithTTA(cfg, model).nms_thresh
