"""The proposals of two-stage detectors."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch.nn.parallel import DistributedDataParallel

from d2proposals.engine import Trainer
from d2proposals.engine.detector_proposals import (
    DetectorProposalEvaluator,
    ProposalRecorder,
    counted_proposals,
    limited_proposals,
    recorded_proposals,
)
from tests.common import make_cfg
from tests.engine.tiny_coco import SMALL


class Listener:
    """An evaluator that keeps what it is given."""

    def process(self, inputs, outputs):
        self.outputs = outputs


def tiny_detector(*overrides):
    torch.manual_seed(0)
    cfg = make_cfg("shapes/faster_rcnn_rpn.yaml", *SMALL, "MODEL.ROI_BOX_HEAD.FC_DIM", 8)
    cfg.merge_from_list(list(overrides))
    return build_model(cfg).eval()


def batch(*sizes):
    return [{"image": torch.rand(3, *size) * 255} for size in sizes]


def record_one_proposal():
    recorder = ProposalRecorder()
    proposals = Instances((50, 100))
    proposals.proposal_boxes = Boxes(torch.tensor([[10.0, 5.0, 60.0, 30.0]]))
    proposals.objectness_logits = torch.tensor([1.0])
    recorder.record(None, (), ([proposals], {}))
    return recorder


def test_proposals_are_rescaled_to_the_original_image():
    recorder = record_one_proposal()
    listener = Listener()
    inputs = [{"image": torch.zeros(3, 50, 100), "height": 100, "width": 400}]
    DetectorProposalEvaluator(listener, recorder).process(inputs, [{}])
    (output,) = listener.outputs
    assert output["proposals"].image_size == (100, 400)
    assert output["proposals"].proposal_boxes.tensor.tolist() == [[40.0, 10.0, 240.0, 60.0]]


def test_without_a_size_to_return_to_proposals_stay():
    recorder = record_one_proposal()
    listener = Listener()
    DetectorProposalEvaluator(listener, recorder).process([{"image": torch.zeros(3, 50, 100)}], [])
    (output,) = listener.outputs
    assert output["proposals"].image_size == (50, 100)
    assert output["proposals"].proposal_boxes.tensor.tolist() == [[10.0, 5.0, 60.0, 30.0]]


def test_recall_of_a_distributed_detector(tiny_coco, tmp_path, process_group):
    overrides = ("DATASETS.TEST", ("tiny_val",), "MODEL.ROI_HEADS.NUM_CLASSES", 80)
    overrides += ("TEST.PROPOSALS.LIMITS", (1000,))
    detector = tiny_detector(*overrides)
    cfg = make_cfg("shapes/faster_rcnn_rpn.yaml", *SMALL, *overrides, "OUTPUT_DIR", str(tmp_path))
    expected = Trainer.test(cfg, detector)["box_proposals"]
    assert expected["AR@1000"] > 0
    results = Trainer.test(cfg, DistributedDataParallel(detector))
    assert results["box_proposals"] == pytest.approx(expected, nan_ok=True)


def test_precomputed_proposals_are_those_of_the_input():
    detector = tiny_detector("MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals")
    proposals = Instances((64, 64))
    proposals.proposal_boxes = Boxes(torch.tensor([[4.0, 4.0, 40.0, 40.0]]))
    proposals.objectness_logits = torch.tensor([2.0])
    inputs = [{"image": torch.rand(3, 64, 64), "proposals": proposals}]
    with torch.no_grad(), recorded_proposals(detector) as recorder:
        detector(inputs)
    assert recorder.take(inputs) == [proposals]


def test_recording_ends_with_its_context():
    detector = tiny_detector()
    with torch.no_grad():
        with recorded_proposals(detector) as recorder:
            detector(batch((64, 64), (64, 80)))
            first, second = recorder.take([{}, {}])
            assert (first.image_size, second.image_size) == ((64, 64), (64, 80))
        detector(batch((64, 64)))
    # Nothing new was recorded, and nothing old is handed out twice.
    with pytest.raises(KeyError):
        recorder.take([{}])


def test_limited_proposals_are_the_best_ones():
    detector, inputs = tiny_detector(), batch((64, 96))
    seen = []

    def see(module, args):
        seen.append(args[2])

    detector.roi_heads.register_forward_pre_hook(see)
    with torch.no_grad():
        detector(inputs)
        with limited_proposals(detector, 3):
            detector(inputs)
        detector(inputs)
    (everything,), (three,), (again,) = seen
    assert len(three) == 3 < len(everything) == len(again)
    assert torch.equal(three.proposal_boxes.tensor, everything.proposal_boxes.tensor[:3])


def test_proposals_are_counted_until_the_context_ends():
    detector = tiny_detector("MODEL.RPN.POST_NMS_TOPK_TEST", 9)
    seen = []
    detector.roi_heads.register_forward_pre_hook(lambda _, args: seen.extend(map(len, args[2])))
    with torch.no_grad():
        with counted_proposals(detector) as counter:
            assert counter.mean == 0
            detector(batch((64, 64), (64, 80)))
            with limited_proposals(detector, 3):
                detector(batch((64, 64)))
        detector(batch((64, 64)))
    assert seen == [9, 9, 3, 9]
    assert (counter.num_images, counter.num_proposals, counter.largest) == (3, 21, 9)
    assert counter.mean == 7


def test_what_has_no_generator_is_refused_by_name():
    detector = tiny_detector("MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals")
    with pytest.raises(ValueError, match="PRECOMPUTED_PROPOSAL_TOPK_TEST"):
        with limited_proposals(detector, 3):
            pass
    with pytest.raises(ValueError, match="not a Linear"):
        with recorded_proposals(torch.nn.Linear(1, 1)):
            pass
