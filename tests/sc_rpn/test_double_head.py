"""Double-Head R-CNN: what each head sees, which output it makes, and its weight."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes, ImageList
from detectron2.utils.events import EventStorage
from torch.nn import functional as F

from d2proposals.sc_rpn.double_head import (
    DoubleBoxHead,
    DoubleHeadOutputLayers,
    DoubleHeadROIHeads,
    EnlargingPooler,
    TwoExtentPooler,
    WideningBlock,
    end_at_images,
)
from tests.common import leaf_keys, make_cfg, make_instances

SHAPE = ShapeSpec(channels=3, height=2, width=2)


def make_pooler(scale):
    pooler = ROIPooler(output_size=1, scales=[1.0], sampling_ratio=4, pooler_type="ROIAlignV2")
    return TwoExtentPooler(pooler, scale)


def test_the_second_extent_is_a_larger_box_around_the_same_centre():
    # A feature map that is one in columns 8 to 12: the box from 8 to 12 sees ones, the box of
    # twice its sides, from 6 to 14, sees them in half of its width.
    x = torch.zeros(1, 1, 20, 20)
    x[..., 8:12] = 1
    pooled = make_pooler(2.0)([x], [Boxes(torch.tensor([[8.0, 5, 12, 9]]))])
    assert pooled.shape == (1, 2, 1, 1)
    assert pooled[0, 0].item() > pooled[0, 1].item()
    assert pooled[0, 1].item() == pytest.approx(0.5, abs=0.01)
    same = make_pooler(1.0)([x], [Boxes(torch.tensor([[8.0, 5, 12, 9]]))])
    assert torch.equal(same[:, 0], same[:, 1])
    larger = EnlargingPooler(lambda maps, boxes: boxes, 1.5)
    assert larger(x, torch.tensor([[3.0, 10, 20, 30, 60]])).tolist() == [[3, 5, 10, 35, 70]]
    with pytest.raises(ValueError, match="REGRESSION_SCALE must be positive, got 0.0"):
        make_pooler(0.0)


def test_both_extents_come_from_the_feature_map_of_the_box():
    # 100 pixels are p2's, 130 would be p3's.
    pooler = ROIPooler(output_size=1, scales=[1 / 4, 1 / 8], sampling_ratio=1,
                       pooler_type="ROIAlignV2")  # fmt: skip
    maps = [torch.full((1, 1, 64, 64), 2.0), torch.full((1, 1, 32, 32), 3.0)]
    boxes = [Boxes(torch.tensor([[50.0, 50, 150, 150], [50.0, 50, 200, 200]]))]
    assert TwoExtentPooler(pooler, 1.3)(maps, boxes).flatten(1).tolist() == [[2, 2], [3, 3]]


def make_head(num_conv=1, norm=""):
    torch.manual_seed(0)
    return DoubleBoxHead(SHAPE, fc_dims=[5, 6], num_conv=num_conv, conv_dim=8, norm=norm)


def test_each_head_sees_its_extent():
    head = make_head()
    x = torch.randn(4, 6, 2, 2)
    before = head(x)
    assert before.shape == (4, head.output_shape.channels) == (4, 6 + 8)
    for part, changed in ((x[:, :3], slice(0, 6)), (x[:, 3:], slice(6, 14))):
        part.add_(1)
        after = head(x)
        differs = (after != before).any(dim=0)
        assert differs[changed].any() and differs.sum() == differs[changed].sum()
        before = after


def test_the_convolution_head_by_its_layers():
    """The widening block's sum, then a bottleneck block, then the mean over positions."""
    head = make_head()
    x = torch.randn(4, 6, 2, 2)
    maps = x[:, 3:]
    wide, bottleneck = head.conv_head
    assert isinstance(wide, WideningBlock)
    hidden = F.conv2d(maps, wide.conv1.weight, padding=1).relu()
    hidden = F.conv2d(hidden, wide.conv2.weight) + F.conv2d(maps, wide.shortcut.weight)
    expected = bottleneck(hidden.relu()).mean(dim=(2, 3))
    torch.testing.assert_close(head(x)[:, 6:], expected)
    flat = x[:, :3].flatten(1)
    first, second = head.fc_head.fc1, head.fc_head.fc2
    torch.testing.assert_close(head(x)[:, :6], second(first(flat).relu()).relu())
    assert len(make_head(num_conv=4).conv_head) == 5


@pytest.mark.parametrize("number", [0, 1, 3])
def test_any_number_of_rois(number):
    head = make_head(norm="BN").train()
    assert head(torch.randn(number, 6, 2, 2)).shape == (number, 14)


def test_outputs_of_each_head_and_the_weights_of_the_losses():
    torch.manual_seed(0)
    layers = DoubleHeadOutputLayers(
        ShapeSpec(channels=14),
        num_class_features=6,
        box2box_transform=Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0)),
        num_classes=2,
        loss_weight={"loss_cls": 3.0, "loss_box_reg": 5.0},
    )
    x = torch.randn(4, 14)
    scores, deltas = layers(x)
    torch.testing.assert_close(scores, F.linear(x[:, :6], layers.cls_score.weight))
    torch.testing.assert_close(deltas, F.linear(x[:, 6:], layers.bbox_pred.weight))
    assert (scores.shape, deltas.shape) == ((4, 3), (4, 8))
    proposals = make_instances((64, 64), [[0, 0, 10, 10], [5, 5, 30, 30]] * 2)
    proposals.proposal_boxes = Boxes(proposals.gt_boxes.tensor + 1)
    with EventStorage():
        weighted = layers.losses((scores, deltas), [proposals])
        layers.loss_weight = {}
        plain = layers.losses((scores, deltas), [proposals])
    assert (weighted["loss_cls"] / plain["loss_cls"]).item() == pytest.approx(3)
    assert (weighted["loss_box_reg"] / plain["loss_box_reg"]).item() == pytest.approx(5)


def test_output_layers_begin_as_detectron2_s():
    torch.manual_seed(0)
    layers = DoubleHeadOutputLayers(
        ShapeSpec(channels=800),
        num_class_features=400,
        box2box_transform=Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0)),
        num_classes=20,
    )
    assert layers.cls_score.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert layers.bbox_pred.weight.std().item() == pytest.approx(0.001, rel=0.1)
    assert not layers.cls_score.bias.any() and not layers.bbox_pred.bias.any()


TINY = (
    *("MODEL.FPN.OUT_CHANNELS", 8, "MODEL.SCRPN.HEAD_CHANNELS", 8, "MODEL.ROI_BOX_HEAD.FC_DIM", 8),
    *("MODEL.ROI_BOX_HEAD.CONV_DIM", 8, "MODEL.SCRPN.POST_NMS_TOPK_TRAIN", 20),
    *("MODEL.DOUBLE_HEAD.CLS_LOSS_WEIGHT", 0.25, "MODEL.DOUBLE_HEAD.REGRESSION_SCALE", 1.125),
    *("MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT", 0.5),
)


def test_configuration_reaches_the_heads():
    cfg = make_cfg("shapes/double_head_rcnn_sc_rpn.yaml", *TINY)
    heads = build_model(cfg).roi_heads
    assert isinstance(heads, DoubleHeadROIHeads) and isinstance(heads.box_head, DoubleBoxHead)
    assert heads.box_pooler.larger.level_poolers[0].scale == 1.125
    assert heads.box_predictor.loss_weight == {"loss_cls": 0.25, "loss_box_reg": 0.5}
    assert heads.box_predictor.sizes == [8, 8] and len(heads.box_head.conv_head) == 2
    assert heads.box_predictor.cls_score.out_features == 17
    assert heads.box_predictor.bbox_pred.out_features == 64
    cfg = make_cfg("shapes/double_head_rcnn_sc_rpn.yaml", *TINY)
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    with pytest.raises(ValueError, match="needs MODEL.ROI_BOX_HEAD.NAME DoubleBoxHead, got Fast"):
        build_model(cfg)
    cfg = make_cfg("shapes/double_head_rcnn_sc_rpn.yaml", *TINY, "MODEL.ROI_BOX_HEAD.NUM_FC", 0)
    with pytest.raises(ValueError, match="NUM_FC of at least 1 and CONV_DIM of at least 4, got 0"):
        build_model(cfg)


def test_features_of_an_image_are_those_it_has_alone():
    """What is beyond a smaller image in a batch is no part of its boxes, nor of the larger ones."""
    cfg = make_cfg("shapes/double_head_rcnn_sc_rpn.yaml", *TINY)
    torch.manual_seed(0)
    heads = build_model(cfg).roi_heads.eval()
    pooled = []
    heads.box_pooler.register_forward_hook(lambda module, inputs, output: pooled.append(output))
    # At the border on the right, and in a corner.
    proposals = make_instances((60, 80), [[50, 20, 80, 52], [64, 48, 80, 60]])
    proposals.proposal_boxes = proposals.gt_boxes
    cells = {f"p{k}": (-(-60 // 2**k), -(-80 // 2**k)) for k in (2, 3, 4, 5)}
    alone = {name: torch.randn(1, 8, *size) for name, size in cells.items()}
    batch = {}
    for k in (2, 3, 4, 5):
        batch[f"p{k}"] = torch.full((1, 8, 128 >> k, 128 >> k), 1e3)
        rows, columns = cells[f"p{k}"]
        batch[f"p{k}"][..., :rows, :columns] = alone[f"p{k}"]
    for maps in (alone, batch):
        heads(ImageList(torch.zeros(1, 3, 128, 128), [(60, 80)]), maps, [proposals])
    assert torch.equal(*pooled) and pooled[0].any()
    # A box within its image has the features that any detector pools.
    plain = heads.box_pooler.pooler([alone[f"p{k}"] for k in (2, 3, 4, 5)], [proposals.gt_boxes])
    torch.testing.assert_close(pooled[0][:, :8], plain)


def test_maps_end_with_their_last_cells_and_zeros():
    maps = torch.arange(1.0, 17).view(1, 1, 4, 4)
    ended = end_at_images(maps, [(9, 17)], 8)[0, 0]  # 2 rows, 3 columns
    assert ended.tolist() == [
        [1, 2, 3, 3, 0, 0],
        [5, 6, 7, 7, 0, 0],
        [5, 6, 7, 7, 0, 0],
        [0] * 6,
        [0] * 6,
        [0] * 6,
    ]


def test_the_two_rows_of_table_ix_differ_in_the_generator():
    rpn, sc_rpn = (leaf_keys(make_cfg(f"double_head_rcnn_{x}.yaml")) for x in ("rpn", "sc_rpn"))
    own = ("MODEL.SCRPN.", "MODEL.RPN.", "MODEL.ANCHOR_GENERATOR.", "MODEL.PROPOSAL_GENERATOR.NAME")
    changed = {key for key in rpn if rpn[key] != sc_rpn[key] and not key.startswith(own)}
    assert changed == {"OUTPUT_DIR"}
    node = make_cfg("double_head_rcnn_sc_rpn.yaml").MODEL
    assert (node.ROI_BOX_HEAD.NUM_CONV, node.ROI_BOX_HEAD.CONV_DIM) == (4, 1024)
    assert (node.DOUBLE_HEAD.CLS_LOSS_WEIGHT, node.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT) == (2, 2)
    assert node.DOUBLE_HEAD.REGRESSION_SCALE == 1.3
    assert node.SCRPN.POST_NMS_TOPK_TEST == rpn["MODEL.RPN.POST_NMS_TOPK_TEST"] == 1000
