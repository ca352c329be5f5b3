"""Every row of the paper's tables is one command away: the page's, as it stands there."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from d2proposals.engine import check_config
from tests.common import make_instances
from tests.zip_rpn.boosting_file import write_boosting_file
from tests.zip_rpn.table_rows import read_rows

ROWS = read_rows()
SMALL = ["MODEL.BN_INCEPTION.WIDTH_FACTOR", 0.125, "MODEL.ZIP.HEAD_CHANNELS", 16,
         "MODEL.BN_INCEPTION.NORM", "GN", "MODEL.ZOOM_NETWORK.NORM", "GN",
         "MODEL.ZIP_DETECTOR.CHANNELS", 32, "MODEL.ZIP_DETECTOR.NORM", "GN",
         "MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64,
         "MODEL.RESNETS.NORM", "BN", "MODEL.FPN.OUT_CHANNELS", 16, "MODEL.WEIGHTS", "",
         "MODEL.ROI_BOX_HEAD.FC_DIM", 16, "MODEL.ZIP.PRE_NMS_TOPK_TRAIN", 200,
         "MODEL.ZIP.PRE_NMS_TOPK_TEST", 200, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16,
         "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "MODEL.VGG.WIDTH_FACTOR", 0.125,
         "MODEL.RETINANET.NUM_CONVS", 1, "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0]  # fmt: skip
OUT, IN, FOUR = [320, 608, 1024], [640, 1216, 1024], [1280, 2432, 1024]
# Anchors per cell of each level, channels of each level at full width, and what is on besides:
# dyTrainScale, equilibrium, the gray class.
PROPOSALS = {
    "Table 1 (a) zoom-out, all anchors on F3": ([30], [1024], ""),
    "Table 1 (b) zoom-out, split anchors": ([10, 10, 10], OUT, ""),
    "Table 1 (c) zoom-out, all anchors everywhere": ([30, 30, 30], OUT, ""),
    "Table 1 (d) ZIP": ([10, 10, 10], IN, ""),
    "Table 1 (e) deeper zoom-out": ([10, 10, 10], OUT, ""),
    "Table 2 baseline": ([10, 10, 10], IN, ""),
    "Table 2 dyTrainScale": ([10, 10, 10], IN, "d"),
    "Table 2 equilibrium": ([10, 10, 10], IN, "e"),
    "Table 2 grayCls": ([10, 10, 10], IN, "g"),
    "Table 2 ZIP + all": ([10, 10, 10], IN, "deg"),
    "Table 2 ZIP + all + MAD": ([10, 10, 10], IN, "deg"),
    "Table 2 spatial MAD": ([10, 10, 10], IN, "deg"),
    "Table 2 ER vector": ([10, 10, 10], IN, "deg"),
}
# Channels of the pooled maps at full width.
DETECTORS = {
    "Table 6 Faster R-CNN": [256] * 4,
    "Table 6 Zoom-out": OUT,
    "Table 6 ZIP baseline": IN,
    "Table 6 ZIP MAD": IN,
    "Table 6 ZIP MAD B": IN,
    "Table 6 ZIP MAD E": FOUR,
    "Table 6 ZIP MAD EB": FOUR,
    "Sec. 5.4 ZIP MAD on VGG-16": [1024] * 3,
}
# Channels of the merged maps at full width, before the convolution that makes them alike.
ONE_STAGE = {
    "Sec. 5.6 one stage, zoom-out": OUT,
    "Sec. 5.6 one stage, zoom-in": IN,
    "Sec. 5.6 one stage, zoom-in and MAD": IN,
}


def make_input(size=(128, 160), boxes=((8, 8, 40, 72), (60, 10, 150, 120))):
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, *size), generator=generator).float()
    return {"image": image, "instances": make_instances(size, boxes),
            "height": size[0], "width": size[1]}  # fmt: skip


def train_a_step(model, *inputs):
    """Losses; every parameter that is trained has a gradient afterwards."""
    with EventStorage() as storage:
        losses = model.train()(list(inputs))
        counts = {name: value for name, (value, _) in storage.latest().items()}
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    return losses, counts


def test_the_page_has_all_rows_and_voc_for_each():
    assert set(ROWS) == {*PROPOSALS, *DETECTORS, *ONE_STAGE}
    for name, row in ROWS.items():
        cfg, _ = row.config()
        check_config(cfg)
        assert cfg.DATASETS.TRAIN == ("voc_2007_trainval", "voc_2012_trainval"), name
        assert cfg.DATASETS.TEST == ("voc_2007_test",) and not cfg.TEST.AUG.ENABLED, name
        assert (cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST) == ((600,), 600), name
        assert name not in DETECTORS or cfg.MODEL.ROI_HEADS.NUM_CLASSES == 20
        assert name not in ONE_STAGE or cfg.MODEL.RETINANET.NUM_CLASSES == 20


def test_rows_have_faster_rcnn_s_settings_but_for_their_strategy():
    for name, (_, _, on) in PROPOSALS.items():
        node = ROWS[name].config()[0].MODEL.ZIP
        assert (node.BBOX_REG_LOSS_TYPE, node.SMOOTH_L1_BETA) == ("smooth_l1", 1.0)
        assert node.LEVEL_NMS_THRESH == 0.7 and tuple(node.MULTI_NMS_THRESHOLDS) == (0.7,)
        samples = (node.BATCH_SIZE_PER_IMAGE, node.BATCH_SIZE_PER_CLASS)
        assert samples == ((300, 100) if on == "deg" else (256, 128))
        thresholds = (node.POSITIVE_IOU, node.NEGATIVE_IOU)
        assert thresholds == ((0.6, 0.25) if "g" in on else (0.7, 0.3))
        assert node.LOW_QUALITY_MATCH == (on != "deg")


def test_faster_rcnn_is_on_the_terms_of_zips_rows():
    configs = [ROWS[name].config()[0] for name in ("Table 6 Faster R-CNN", "Table 6 ZIP MAD")]
    theirs, ours = (
        (
            node.POST_NMS_TOPK_TRAIN,
            node.POST_NMS_TOPK_TEST,
            cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE,
            cfg.INPUT.RANDOM_FLIP,
            cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH,
        )
        for cfg, node in zip(configs, (configs[0].MODEL.RPN, configs[1].MODEL.ZIP), strict=True)
    )
    assert theirs == ours == (2000, 300, 128, "none", 132000)
    # Two drops where Detectron2 has them for VOC, after two thirds and eight ninths.
    steps, end = configs[0].SOLVER.STEPS, configs[0].SOLVER.MAX_ITER
    assert [step / end for step in steps] == pytest.approx([2 / 3, 8 / 9], abs=1e-3)


@pytest.mark.parametrize("name", PROPOSALS)
def test_row_of_proposals_builds_trains_a_step_and_proposes(name):
    num_anchors, channels, on = PROPOSALS[name]
    torch.manual_seed(0)
    cfg, eval_only = ROWS[name].config(*SMALL)
    assert not eval_only and cfg.INPUT.DY_TRAIN_SCALE.ENABLED == ("d" in on)
    model = build_model(cfg)
    generator = model.proposal_generator
    assert generator.anchor_generator.num_anchors == num_anchors
    assert generator.heads.heads[0].num_classes == (3 if "g" in on else 2)
    assert generator.sampler.equilibrium == ("e" in on)
    _, counts = train_a_step(model, make_input())
    assert (counts["zip/num_gray_anchors"] > 0) == ("g" in on)
    if "e" not in on:  # negatives fill the batch
        assert counts["zip/num_neg_anchors"] > 2 * counts["zip/num_pos_anchors"]
    with torch.no_grad():
        (output,) = model.eval()([make_input()])
    assert len(output["proposals"]) > 0
    with torch.device("meta"):
        model = build_model(ROWS[name].config("MODEL.DEVICE", "meta")[0])
    shapes = model.backbone.output_shape()
    assert [shapes[f].channels for f in model.proposal_generator.in_features] == channels


@pytest.mark.parametrize("name", DETECTORS)
def test_row_of_detectors_builds_trains_a_step_and_detects(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in ("boosting.npz", "boosting_e.npz"):
        write_boosting_file(tmp_path / file, channels=32)
    torch.manual_seed(0)
    cfg, eval_only = ROWS[name].config(*SMALL)
    is_trained = ROWS[name].config()[0].MODEL.WEIGHTS.startswith("output/")
    is_boosted = cfg.MODEL.ZIP_DETECTOR.BOOSTING_FILE.startswith("boosting")
    assert is_boosted == eval_only == is_trained == name.endswith("B")
    model = build_model(cfg)
    losses, _ = train_a_step(model, make_input(), make_input((64, 96), []))
    generator = "rpn" if "Faster" in name else "zip"
    assert set(losses) == {
        "loss_cls", "loss_box_reg", f"loss_{generator}_cls", f"loss_{generator}_loc"
    }  # fmt: skip
    with torch.no_grad():
        first, second = (model.eval()([make_input()])[0]["instances"] for _ in range(2))
    assert torch.equal(first.scores, second.scores)
    assert torch.equal(first.pred_boxes.tensor, second.pred_boxes.tensor)
    assert len(first) > 0
    overrides = ["MODEL.DEVICE", "meta", "MODEL.ZIP_DETECTOR.BOOSTING_FILE", ""]
    with torch.device("meta"):
        model = build_model(ROWS[name].config(*overrides)[0])
    shapes = model.backbone.output_shape()
    in_features = model.roi_heads.box_in_features
    assert [shapes[f].channels for f in in_features] == DETECTORS[name]
    if generator == "zip":
        assert [p.out_channels for p in model.roi_heads.box_pooler.projections] == [1024] * 3


@pytest.mark.parametrize("name", ONE_STAGE)
def test_row_of_one_stage_builds_trains_a_step_and_detects(name):
    torch.manual_seed(0)
    cfg, _ = ROWS[name].config(*SMALL)
    assert cfg.MODEL.META_ARCHITECTURE == "RetinaNet" and not cfg.INPUT.DY_TRAIN_SCALE.ENABLED
    model = build_model(cfg)
    assert model.anchor_generator.num_anchors == [10, 10, 10]
    assert (len(model.backbone.attentions) > 0) == name.endswith("MAD")
    losses, _ = train_a_step(model, make_input(), make_input((64, 96), []))
    assert set(losses) == {"loss_cls", "loss_box_reg"}
    with torch.no_grad():
        first, second = (model.eval()([make_input()])[0]["instances"] for _ in range(2))
    assert len(first) == 100 and torch.equal(first.scores, second.scores)
    with torch.device("meta"):
        backbone = build_model(ROWS[name].config("MODEL.DEVICE", "meta")[0]).backbone
    assert [layer.in_channels for layer in backbone.projections] == ONE_STAGE[name]
    assert {shape.channels for shape in backbone.output_shape().values()} == {256}
