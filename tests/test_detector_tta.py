"""Test-time augmentation of detectors with every generator."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from d2proposals.engine import (
    DetectorWithTTA,
    ProposalNetworkWithTTA,
    Trainer,
    without_test_resize,
)
from d2proposals.evaluation.export import proposal_network_of
from d2proposals.proposals.native_size import NativeSizes
from tests.test_contract import GENERATORS, host_cfg, make_batch

AUGMENTED = (
    "TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", (64, 96), "TEST.AUG.MAX_SIZE", 160,
    "TEST.AUG.FLIP", True, "INPUT.MIN_SIZE_TEST", 80, "TEST.DETECTIONS_PER_IMAGE", 20,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0,
)  # fmt: skip


def augmented_model(cfg):
    torch.manual_seed(0)
    model = Trainer.build_model(cfg).eval()
    return DetectorWithTTA(cfg, model), model


def detect(augmented):
    batch = [
        {**x, "image": x["image"].to(torch.uint8), "height": 80, "width": 120}
        for x in make_batch([])
    ]
    with torch.no_grad():
        return [output["instances"] for output in augmented(batch)]


def check_detections(detections):
    for detections_i in detections:
        boxes, scores = detections_i.pred_boxes.tensor, detections_i.scores
        assert detections_i.image_size == (80, 120)
        assert 0 < len(detections_i) <= 20
        assert boxes.isfinite().all() and scores.isfinite().all()
        assert (boxes >= 0).all() and (boxes <= boxes.new_tensor([120, 80, 120, 80])).all()
        assert (boxes[:, 2:] >= boxes[:, :2]).all()
        assert (scores[1:] <= scores[:-1]).all() and (scores >= 0).all() and (scores <= 1).all()
        assert set(detections_i.pred_classes.tolist()) <= {0, 1, 2}


def assert_same(detections, others):
    for a, b in zip(detections, others, strict=True):
        assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
        assert torch.equal(a.scores, b.scores) and torch.equal(a.pred_classes, b.pred_classes)


@pytest.mark.parametrize("host", ["FasterRCNN", "CascadeRCNN"])
@pytest.mark.parametrize("generator", GENERATORS)
def test_detections_are_finite_and_the_same_again_and_frozen(generator, host):
    cfg = host_cfg(generator, host, *AUGMENTED)
    augmented, model = augmented_model(cfg)
    sizes = []
    hook = model.proposal_generator.register_forward_pre_hook(
        lambda module, args: sizes.extend(args[0].image_sizes)
    )
    detections = detect(augmented)
    hook.remove()
    check_detections(detections)
    # Two scales, each as it is and mirrored.
    assert sizes == [(64, 85), (64, 85), (96, 128), (96, 128)]
    assert_same(detections, detect(augmented))

    cfg.merge_from_list(["MODEL.PROPOSAL_GENERATOR.FREEZE", True, "MODEL.BACKBONE.FREEZE", True])
    frozen, _ = augmented_model(cfg)
    assert_same(detections, detect(frozen))


@pytest.mark.parametrize("class_agnostic", [True, False])
def test_the_heads_of_detectornet(class_agnostic):
    cfg = host_cfg(
        "DetectorNet", "FasterRCNN", *AUGMENTED, "MODEL.ROI_HEADS.NAME", "DetectorNetHeads",
        "MODEL.DETECTORNET.CLASS_AGNOSTIC", class_agnostic,
        "MODEL.DETECTORNET.CLASSIFIER.ENABLED", class_agnostic,
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST", -1.0,
    )  # fmt: skip
    augmented, _ = augmented_model(cfg)
    if class_agnostic:
        # Untrained, it may see nothing but background.
        augmented.model.roi_heads.classifier.network.output.bias.data[-1] = -10.0
    detections = detect(augmented)
    check_detections(detections)
    assert_same(detections, detect(augmented))


def test_a_flip_mirrors_detections_back():
    # The heads see the left half of an image as an object, so the mirrored one is on the right.
    class LeftHalf(torch.nn.Module):
        def forward(self, images, features, proposals, targets=None):
            return [
                Instances(
                    size,
                    pred_boxes=Boxes(torch.tensor([[0.0, 0.0, size[1] / 2, size[0]]])),
                    scores=torch.tensor([0.5]),
                    pred_classes=torch.tensor([0]),
                )
                for size in images.image_sizes
            ], {}

    cfg = host_cfg("DeepMask", "FasterRCNN", *AUGMENTED)
    model = build_model(cfg).eval()
    model.roi_heads = LeftHalf()
    (first,) = detect(DetectorWithTTA(cfg, model))
    boxes = sorted(tuple(round(x) for x in box) for box in first.pred_boxes.tensor.tolist())
    assert boxes == [(0, 0, 60, 80), (60, 0, 120, 80)]


@pytest.mark.parametrize("generator", ["DeepMask", "SPOP"])
def test_the_sizes_of_the_augmentation_are_sizes_of_the_pyramid(generator, monkeypatch):
    # An image of 80 x 120, which the usual test makes 96 x 144.
    cfg = host_cfg(generator, "FasterRCNN", *AUGMENTED, "INPUT.MIN_SIZE_TEST", 96)
    augmented, model = augmented_model(cfg)
    asked, native_sizes = [], NativeSizes.__call__

    def spy(self, image_sizes):
        sizes = native_sizes(self, image_sizes)
        asked.extend(sizes)
        return sizes

    monkeypatch.setattr(NativeSizes, "__call__", spy)
    images = [{"image": torch.zeros(3, 80, 120, dtype=torch.uint8), "height": 80, "width": 120}]
    with torch.no_grad():
        augmented(images)
        # 64 and 96 pixels, each as it is and mirrored: the latter is the usual test.
        assert asked == [(53, 80), (53, 80), (80, 120), (80, 120)]
        asked.clear()
        ProposalNetworkWithTTA(cfg, proposal_network_of(model))(images)
        assert asked == [(53, 80), (53, 80), (80, 120), (80, 120)]
        # Tested at their own size, augmented images are taken as they are.
        asked.clear()
        DetectorWithTTA(without_test_resize(cfg), model)(images)
    assert asked == [(64, 96), (64, 96), (96, 144), (96, 144)]
