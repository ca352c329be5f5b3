"""Any generator in any detector: by one entry of _BASE_, with its recall next to its AP."""

import itertools
import json
from pathlib import Path

import detectron2
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
from d2proposals.sc_rpn import SCRPN, DoubleHeadROIHeads
from d2proposals.spop import SPOP
from d2proposals.zip_rpn import ZIP
from tests.common import CONFIGS, leaf_keys, make_cfg
from tests.engine.tiny_coco import SMALL

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
    "Base-Double-Head-RCNN-FPN.yaml": DoubleHeadROIHeads,
}
# What belongs to a generator: its own nodes, and what it needs of the data and the optimizer.
GENERATORS_OWN = ("MODEL.ANCHOR_GENERATOR.", "MODEL.PROPOSAL_GENERATOR.NAME", "MODEL.ZIP.",
                  "MODEL.RPN.", "MODEL.SPOP.", "INPUT.USE_INSTANCE_MASK", "INPUT.MASK_FORMAT",
                  # Unused: clipping is off.
                  "SOLVER.CLIP_GRADIENTS.CLIP_VALUE",
                  "SOLVER.CLIP_GRADIENTS.CLIP_TYPE")  # fmt: skip


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


# Sec. IV-A of SC-RPN: "all the detectors".
SC_RPN_SCHEDULE = {
    "INPUT.MIN_SIZE_TRAIN": (800,),
    "SOLVER.IMS_PER_BATCH": 4,
    "SOLVER.BASE_LR": 0.005,
    "SOLVER.STEPS": (234532, 322482),
    "SOLVER.MAX_ITER": 351798,
    "SOLVER.WARMUP_ITERS": 500,
    "SOLVER.CLIP_GRADIENTS.ENABLED": True,
}
# "The overlapping threshold in R-CNN is set to 0.65 and the region proposal number [...] 300."
SC_RPN_HEADS = {
    **{f"MODEL.{x}.POST_NMS_TOPK_{y}": 300 for x in ("RPN", "SCRPN") for y in ("TRAIN", "TEST")},
    "MODEL.ROI_HEADS.IOU_THRESHOLDS": [0.65],
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 256,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": (25.0, 25.0, 12.5, 12.5),
}
SC_RPN_CLIPPING = {
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "full_model",
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 35.0,
}

# What each ready-made file adds to its pair.
ADDED = {
    "faster_rcnn_rpn.yaml": {},
    "cascade_rcnn_rpn.yaml": {},
    "faster_rcnn_sc_rpn.yaml": {
        **SC_RPN_SCHEDULE,
        **SC_RPN_HEADS,
        "MODEL.SCRPN.LOSS_WEIGHT": 0.7,
    },
    "cascade_rcnn_sc_rpn.yaml": {**SC_RPN_SCHEDULE, "MODEL.SCRPN.LOSS_WEIGHT": 0.7},
    # RPN beside them.
    "faster_rcnn_rpn_as_sc_rpn.yaml": {
        **SC_RPN_SCHEDULE,
        **SC_RPN_HEADS,
        **SC_RPN_CLIPPING,
        "MODEL.RPN.PRE_NMS_TOPK_TEST": 2000,
    },
    "cascade_rcnn_rpn_as_sc_rpn.yaml": {
        **SC_RPN_SCHEDULE,
        **SC_RPN_CLIPPING,
        "MODEL.RPN.PRE_NMS_TOPK_TEST": 2000,
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": 1000,
    },
    **{
        f"{kind}_rcnn_zip.yaml": {
            "MODEL.ZIP.POST_NMS_TOPK_TRAIN": 300,
            "MODEL.ZIP.POST_NMS_TOPK_TEST": 300,
            "MODEL.ZIP.PRE_NMS_TOPK_TRAIN": 2000,
        }
        for kind in ("faster", "cascade")
    },
    **{
        f"{kind}_rcnn_deepmask.yaml": {
            "MODEL.DEEPMASK.NMS_THRESH": 0.8,
            "MODEL.DEEPMASK.BATCH_SIZE_PER_IMAGE": 2,
            "SOLVER.PROPOSAL_GENERATOR_LR_FACTOR": 0.05,
        }
        for kind in ("faster", "cascade")
    },
    **{
        f"{kind}_rcnn_spop.yaml": {
            "SOLVER.PROPOSAL_GENERATOR_LR_FACTOR": 0.05,
            "SOLVER.CLIP_GRADIENTS.ENABLED": True,
        }
        for kind in ("faster", "cascade")
    },
    **{
        f"{kind}_rcnn_detectornet.yaml": {
            "MODEL.DETECTORNET.TOPK_PER_SCALE": 100,
            "MODEL.DETECTORNET.SCORE_THRESH": -1.0,
            "MODEL.DETECTORNET.NMS_TYPE": "iou",
            "SOLVER.PROPOSAL_GENERATOR_LR_FACTOR": 0.05,
        }
        for kind in ("faster", "cascade")
    },
}


@pytest.mark.parametrize("name", ADDED)
def test_each_file_is_its_pair_and_a_few_keys(name, tmp_path):
    kind, short = name.removesuffix(".yaml").split("_rcnn_")
    first = short.removesuffix("_as_sc_rpn")
    (generator,) = [x for x in GENERATORS if x in (f"{first}_only.yaml", f"{first}_rpn_only.yaml",
                                                   f"{first}_fpn_only.yaml")]  # fmt: skip
    base = "Base-RCNN-FPN.yaml" if kind == "faster" else "Base-Cascade-RCNN-FPN.yaml"
    cfg, pair = leaf_keys(make_cfg(name)), leaf_keys(pair_cfg(tmp_path, generator, base))
    changed = {key: value for key, value in cfg.items() if value != pair[key]}
    assert changed.pop("OUTPUT_DIR") == f"./output/{kind}_rcnn_{short}"
    assert changed == ADDED[name]


def test_the_small_detector_with_sc_rpn_has_the_settings_of_the_large_one():
    small = leaf_keys(make_cfg("shapes/faster_rcnn_sc_rpn.yaml"))
    settings = {
        **{key: value for key, value in SC_RPN_HEADS.items() if not key.startswith("MODEL.RPN.")},
        "MODEL.SCRPN.LOSS_WEIGHT": 0.7,
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 128,
        "SOLVER.CLIP_GRADIENTS.ENABLED": True,
    }
    assert {key: small[key] for key in settings} == settings


# What tells SC-RPN and RPN apart.
COMPARED_GENERATORS_OWN = ("MODEL.SCRPN.", "MODEL.RPN.", "MODEL.ANCHOR_GENERATOR.",
             "MODEL.PROPOSAL_GENERATOR.NAME")  # fmt: skip


# Detector with SC-RPN -> with RPN.
COMPARED = {
    "faster_rcnn_sc_rpn.yaml": "faster_rcnn_rpn_as_sc_rpn.yaml",
    "cascade_rcnn_sc_rpn.yaml": "cascade_rcnn_rpn_as_sc_rpn.yaml",
    "double_head_rcnn_sc_rpn.yaml": "double_head_rcnn_rpn.yaml",
}


def test_detectors_with_sc_rpn_and_with_rpn_are_compared_on_the_same_terms():
    for pair in COMPARED.items():
        ours, theirs = (leaf_keys(make_cfg(name)) for name in pair)
        for part, run in itertools.product(("PRE", "POST"), ("TRAIN", "TEST")):
            key = f"{part}_NMS_TOPK_{run}"
            assert ours[f"MODEL.SCRPN.{key}"] == theirs[f"MODEL.RPN.{key}"], (pair, key)
        changed = {
            key
            for key in ours
            if ours[key] != theirs[key] and not key.startswith(COMPARED_GENERATORS_OWN)
        }
        assert changed == {"OUTPUT_DIR"}
    # The linear scaling rule: as much for each image as Detectron2's .02 for 16.
    assert ours["SOLVER.BASE_LR"] / ours["SOLVER.IMS_PER_BATCH"] == 0.02 / 16


def test_rpn_is_compared_on_the_same_terms():
    """Table I: alone, on the schedule of SC-RPN."""
    ours, theirs = (leaf_keys(make_cfg(f"{x}.yaml")) for x in ("sc_rpn_only", "rpn_as_sc_rpn"))
    changed = {
        key
        for key in ours
        if ours[key] != theirs[key] and not key.startswith(COMPARED_GENERATORS_OWN)
    }
    assert changed == {"OUTPUT_DIR"}
    for key, number in (("PRE_NMS_TOPK_TEST", 2000), ("POST_NMS_TOPK_TEST", 1000)):
        assert ours[f"MODEL.SCRPN.{key}"] == theirs[f"MODEL.RPN.{key}"] == number


def test_fast_rcnn_has_faster_rcnn_s_heads_and_schedule():
    """Table II: what differs is where the proposals come from."""
    ours, theirs = (
        leaf_keys(make_cfg(f"{x}.yaml"))
        for x in ("fast_rcnn_as_sc_rpn", "faster_rcnn_rpn_as_sc_rpn")
    )
    changed = {
        key
        for key in ours
        if ours[key] != theirs[key] and not key.startswith(COMPARED_GENERATORS_OWN)
    }
    topk = {f"DATASETS.PRECOMPUTED_PROPOSAL_TOPK_{x}" for x in ("TRAIN", "TEST")}
    files = {f"DATASETS.PROPOSAL_FILES_{x}" for x in ("TRAIN", "TEST")}
    assert changed == {"MODEL.LOAD_PROPOSALS", "OUTPUT_DIR", *topk, *files}
    assert {ours[key] for key in topk} == {theirs["MODEL.RPN.POST_NMS_TOPK_TEST"]} == {300}


def test_the_small_configurations_clip_each_parameter_by_itself():
    for name in ("sc_rpn_only", "faster_rcnn_sc_rpn", "double_head_rcnn_sc_rpn"):
        clipping = make_cfg(f"shapes/{name}.yaml").SOLVER.CLIP_GRADIENTS
        assert (clipping.ENABLED, clipping.CLIP_TYPE, clipping.CLIP_VALUE) == (True, "norm", 1.0)
    clipping = make_cfg("sc_rpn_only.yaml").SOLVER.CLIP_GRADIENTS
    assert (clipping.ENABLED, clipping.CLIP_TYPE, clipping.CLIP_VALUE) == (True, "full_model", 35)


def test_every_generator_hands_on_a_thousand_proposals_at_most(tmp_path):
    for generator in GENERATORS:
        cfg = pair_cfg(tmp_path, generator, "Base-RCNN-FPN.yaml")
        node = cfg.MODEL.get(cfg.MODEL.PROPOSAL_GENERATOR.NAME.upper())
        if generator != "detectornet_rpn_only.yaml":
            assert (node.POST_NMS_TOPK_TRAIN, node.POST_NMS_TOPK_TEST) == (1000, 1000)


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("faster_rcnn_rpn.yaml", "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"),
        ("cascade_rcnn_rpn.yaml", "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml"),
    ],
)
def test_with_rpn_they_are_detectron2s_own(name, reference):
    path = Path(detectron2.__file__).parent / "model_zoo" / "configs" / reference
    if not path.is_file():
        pytest.skip("this Detectron2 has no model zoo")
    theirs = get_cfg()
    theirs.merge_from_file(str(path))
    theirs, ours = leaf_keys(theirs), leaf_keys(make_cfg(name))
    # Written out here for the other generators, or of no effect on training and plain testing.
    differing = {"MODEL.DEVICE", "OUTPUT_DIR", "TEST.AUG.MAX_SIZE", "MODEL.MASK_ON",
                 "MODEL.PROPOSAL_GENERATOR.MIN_SIZE"}  # fmt: skip
    assert {k for k in theirs if _plain(theirs[k]) != _plain(ours[k])} - differing == set()


def _plain(value):
    return list(value) if isinstance(value, tuple) else value


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
