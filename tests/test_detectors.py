"""Any generator in any detector: by one entry of _BASE_, with its recall next to its AP."""

import json
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import CascadeROIHeads, StandardROIHeads

from d2proposals import add_d2proposals_config
from d2proposals.deepmask import DeepMask
from d2proposals.detectornet import DetectorNet
from d2proposals.engine import Trainer, check_config
from d2proposals.sc_rpn import SCRPN
from d2proposals.spop import SPOP
from d2proposals.zip_rpn import ZIP
from tests.common import CONFIGS, leaf_keys, make_cfg
from tests.engine.tiny_coco import SMALL, registered, write_tiny_coco

GENERATORS = {
    "rpn_only.yaml": RPN,
    "sc_rpn_only.yaml": SCRPN,
    "zip_fpn_only.yaml": ZIP,
    "deepmask_rpn_only.yaml": DeepMask,
    "spop_rpn_only.yaml": SPOP,
    "detectornet_rpn_only.yaml": DetectorNet,
}
DETECTORS = {
    "Base-RCNN-FPN.yaml": StandardROIHeads,
    "Base-Cascade-RCNN-FPN.yaml": CascadeROIHeads,
}
# What belongs to a generator: its own nodes, and what it needs of the data and the optimizer.
GENERATORS_OWN = ("MODEL.ANCHOR_GENERATOR.", "MODEL.PROPOSAL_GENERATOR.NAME", "MODEL.ZIP.",
                  "MODEL.RPN.", "MODEL.SPOP.", "INPUT.USE_INSTANCE_MASK", "INPUT.MASK_FORMAT",
                  "SOLVER.CLIP_GRADIENTS.")  # fmt: skip


def pair_cfg(tmp_path, generator, detector, folder=CONFIGS):
    """The configuration of a file of nothing but two entries in _BASE_."""
    file = tmp_path / "pair.yaml"
    file.write_text(f'_BASE_: ["{folder / generator}", "{folder / detector}"]\n')
    cfg = get_cfg()
    add_d2proposals_config(cfg)
    cfg.merge_from_file(str(file))
    cfg.MODEL.DEVICE = "cpu"
    return cfg


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("generator", GENERATORS)
def test_two_files_make_a_detector(generator, detector, tmp_path):
    cfg = pair_cfg(tmp_path, generator, detector)
    check_config(cfg)
    with torch.device("meta"):
        cfg.MODEL.DEVICE = "meta"
        model = build_model(cfg)
    assert type(model.proposal_generator) is GENERATORS[generator]
    assert type(model.roi_heads) is DETECTORS[detector]


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("generator", GENERATORS)
def test_swapping_changes_the_generators_keys_and_nothing_else(generator, detector, tmp_path):
    """Two detectors are compared on the same input, schedule, backbone and heads."""
    cfg = leaf_keys(pair_cfg(tmp_path, generator, detector))
    reference = leaf_keys(pair_cfg(tmp_path, "rpn_only.yaml", detector))
    changed = {key for key in cfg if cfg[key] != reference[key]}
    assert {key for key in changed if not key.startswith(GENERATORS_OWN)} == set()
    assert changed or generator == "rpn_only.yaml"


@pytest.mark.parametrize("kind", ["faster", "cascade"])
@pytest.mark.parametrize("generator", GENERATORS)
def test_each_file_is_its_pair_and_a_few_keys_of_the_generator(generator, kind, tmp_path):
    base = "Base-RCNN-FPN.yaml" if kind == "faster" else "Base-Cascade-RCNN-FPN.yaml"
    short = generator.removesuffix("_only.yaml").removesuffix("_rpn").removesuffix("_fpn")
    short = {"sc": "sc_rpn"}.get(short, short)
    cfg = leaf_keys(make_cfg(f"{kind}_rcnn_{short}.yaml"))
    pair = leaf_keys(pair_cfg(tmp_path, generator, base))
    changed = {key for key in cfg if cfg[key] != pair[key]} - {"OUTPUT_DIR"}
    assert len(changed) <= 6
    assert cfg["OUTPUT_DIR"] == f"./output/{kind}_rcnn_{short}"
    heads = {key for key in changed if key.startswith("MODEL.ROI_")}
    assert not heads or (kind, short) == ("faster", "sc_rpn")


def test_settings_of_the_detector_with_sc_rpn():
    # "The overlapping threshold in R-CNN is set to 0.65 and the region proposal number [...] to 300."
    cfg = make_cfg("faster_rcnn_sc_rpn.yaml")
    with torch.device("meta"):
        cfg.MODEL.DEVICE = "meta"
        model = build_model(cfg)
    assert model.roi_heads.proposal_matcher.thresholds[1:-1] == [0.65]
    assert model.proposal_generator.post_nms_topk == {True: 300, False: 300}


@pytest.fixture
def tiny_coco(tmp_path):
    with registered(write_tiny_coco(tmp_path / "datasets") / "coco"):
        yield


def tiny_detector_cfg(output_dir, *overrides):
    return make_cfg(
        "shapes/faster_rcnn_rpn.yaml", *SMALL,
        "DATASETS.TRAIN", ("tiny_train",), "DATASETS.TEST", ("tiny_val",),
        "MODEL.ROI_HEADS.NUM_CLASSES", 80, "MODEL.ROI_BOX_HEAD.FC_DIM", 8,
        "OUTPUT_DIR", str(output_dir), *overrides,
    )  # fmt: skip


@pytest.mark.parametrize("generator", ["RPN", "SCRPN"])
def test_recall_next_to_ap_is_that_of_the_generator_alone(generator, tiny_coco, tmp_path):
    overrides = ("MODEL.PROPOSAL_GENERATOR.NAME", generator, "MODEL.SCRPN.HEAD_CHANNELS", 8)
    # The network sees the images larger than they are: the proposals are scaled back.
    overrides += ("INPUT.MIN_SIZE_TEST", 96)
    cfg = tiny_detector_cfg(tmp_path / "detector", *overrides)
    torch.manual_seed(0)
    detector = build_model(cfg).eval()
    calls = []
    detector.proposal_generator.register_forward_hook(lambda *args: calls.append(1))
    results = Trainer.test(cfg, detector)
    assert results["bbox"].keys() >= {"AP", "AP50", "APs"}
    assert len(calls) == 4, "one pass for each of the images"

    cfg = tiny_detector_cfg(
        tmp_path / "alone", *overrides, "MODEL.META_ARCHITECTURE", "ProposalNetwork"
    )
    alone = build_model(cfg).eval()
    alone.load_state_dict(
        {k: v for k, v in detector.state_dict().items() if not k.startswith("roi_heads.")}
    )
    assert results["box_proposals"] == Trainer.test(cfg, alone)["box_proposals"]
    assert results["box_proposals"]["ABO@100"] > 0
    (file,) = Path(tmp_path / "detector").rglob("proposal_results.json")
    assert json.loads(file.read_text())["num_images"] == 4


def test_recall_of_detectors_is_a_key(tiny_coco, tmp_path):
    cfg = tiny_detector_cfg(tmp_path, "TEST.PROPOSALS.OF_DETECTORS", False)
    assert "box_proposals" not in Trainer.test(cfg, build_model(cfg).eval())
