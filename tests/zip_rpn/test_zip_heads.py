"""ZIP's detector: pooling by level, the shared follow-up network, and Detectron2's heads around."""

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import GeneralizedRCNNWithTTA, build_model
from detectron2.modeling.roi_heads import build_roi_heads
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn
from torchvision.ops import roi_align

from d2proposals.zip_rpn import ZIPHeads
from d2proposals.zip_rpn.follow_up import FollowUpBlocks, LevelPooler
from tests.common import make_cfg, make_images, make_instances, set_all

LEVELS = {"zoom1": (8, 12), "zoom2": (16, 20), "zoom3": (32, 16)}  # name -> stride, channels
SHAPES = {name: ShapeSpec(channels=c, stride=s) for name, (s, c) in LEVELS.items()}
HEADS = ["MODEL.ROI_HEADS.NAME", "ZIPHeads", "MODEL.ROI_HEADS.IN_FEATURES", list(LEVELS),
         "MODEL.ROI_HEADS.NUM_CLASSES", 3, "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 7,
         "MODEL.ZIP_DETECTOR.CHANNELS", 32, "MODEL.ZIP_DETECTOR.NORM", "GN"]  # fmt: skip
SMALL = ["MODEL.BN_INCEPTION.WIDTH_FACTOR", 0.125, "MODEL.ZIP.HEAD_CHANNELS", 16,
         "MODEL.BN_INCEPTION.NORM", "GN", "MODEL.ZOOM_NETWORK.NORM", "GN",
         "MODEL.ZIP_DETECTOR.CHANNELS", 32, "MODEL.ZIP_DETECTOR.NORM", "GN"]  # fmt: skip
# One of each level, not in their order: sides 100, 20, 300, 30.
BOXES = [[10, 10, 110, 110], [40, 30, 60, 50], [0, 0, 300, 300], [100, 20, 120, 65]]


def build_heads(*overrides) -> ZIPHeads:
    torch.manual_seed(0)
    return build_roi_heads(make_cfg(None, *HEADS, *overrides), SHAPES)


def make_features(images, seed=1):
    generator = torch.Generator().manual_seed(seed)
    height, width = images.tensor.shape[-2:]
    return {
        name: torch.randn(len(images), c, height // s, width // s, generator=generator)
        for name, (s, c) in LEVELS.items()
    }


def make_proposals(image_size, boxes=BOXES):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    proposals = Instances(image_size)
    proposals.proposal_boxes = Boxes(boxes)
    proposals.objectness_logits = torch.zeros(len(boxes))
    return proposals


def make_pooler(**kwargs) -> LevelPooler:
    settings = {"in_channels": [3, 5, 4], "strides": [8, 16, 32], "out_channels": 6, **kwargs}
    torch.manual_seed(0)
    pooler = LevelPooler(**settings)
    for projection in pooler.projections:
        nn.init.normal_(projection.bias)
    return pooler


def make_maps(num_images=2, size=320):
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randn(num_images, c, size // s, size // s, generator=generator)
        for c, s in ((3, 8), (5, 16), (4, 32))
    ]


@pytest.mark.parametrize(
    "box, level",
    [
        ([0, 0, 45, 45], 0),
        ([0, 0, 45.25, 45.25], 1),  # a bound belongs to the level above it
        ([0, 0, 20, 102.5], 1),  # by area, not by one side: 45.28
        ([5, 5, 5, 5], 0),  # empty
        ([7, 7, 188, 188], 1),
        ([7, 7, 188.1, 188.1], 2),
        ([0, 0, 5000, 5000], 2),
    ],
)
def test_level_of_a_roi_is_that_of_the_anchors_of_its_side(box, level):
    boxes = torch.tensor([box], dtype=torch.float32)
    assert make_pooler().assign_levels(boxes).tolist() == [level]


def test_rois_are_pooled_from_their_level_through_its_convolution_in_their_order():
    pooler, maps = make_pooler(), make_maps()
    torch.manual_seed(1)
    corners, sides = 200 * torch.rand(20, 2), torch.tensor([20.0, 90, 250, 60, 10] * 4)[:, None]
    boxes = torch.cat([corners, corners + sides * (0.5 + torch.rand(20, 2))], dim=1)
    with torch.no_grad():
        result = pooler(maps, [Boxes(boxes[:8]), Boxes(boxes[8:])])
        for i, box in enumerate(boxes):
            side = float(((box[2] - box[0]) * (box[3] - box[1])).sqrt())
            level = 0 if side < 45.25 else 1 if side < 181.02 else 2
            x = maps[level][int(i >= 8)][None]
            x = roi_align(x, [box[None]], (7, 7), 1 / (8, 16, 32)[level], 0, aligned=True)
            weight, bias = pooler.projections[level].weight, pooler.projections[level].bias
            expected = torch.einsum("oc,nchw->nohw", weight[:, :, 0, 0], x) + bias[:, None, None]
            torch.testing.assert_close(result[i : i + 1], expected.clamp(min=0))
    levels = pooler.assign_levels(boxes)
    assert set(levels.tolist()) == {0, 1, 2} and (levels[1:] < levels[:-1]).any()


def test_convolution_of_the_mean_is_worked_by_hand():
    # A constant map pools to itself: level 1 has 2, which 3 times 2 + 1 makes 7; negative is cut.
    pooler = make_pooler(in_channels=[1, 1, 1], out_channels=2, output_size=1)
    with torch.no_grad():
        for factor, projection in zip((1.0, 3.0, 5.0), pooler.projections, strict=True):
            projection.weight.copy_(torch.tensor([factor, -factor]).view(2, 1, 1, 1))
            projection.bias.fill_(1.0)
    maps = [torch.full((1, 1, 320 // s, 320 // s), v) for s, v in ((8, 1.0), (16, 2.0), (32, 3.0))]
    result = pooler(maps, [Boxes(torch.tensor(BOXES, dtype=torch.float32))])
    # Levels 1, 0, 2, 0: 3 * 2 + 1, 1 * 1 + 1, 5 * 3 + 1.
    assert result[:, :, 0, 0].tolist() == [[7, 0], [2, 0], [16, 0], [2, 0]]


@pytest.mark.parametrize("pooler_type", ["ROIAlign", "ROIPool"])
def test_other_poolers(pooler_type):
    result = make_pooler(pooler_type=pooler_type)(make_maps(1), [Boxes(torch.tensor(BOXES) * 1.0)])
    assert result.shape == (4, 6, 7, 7) and result.isfinite().all()


def test_one_level_is_enough():
    pooler = make_pooler(in_channels=[4], strides=[32], level_sides=[])
    result = pooler([make_maps(1)[2]], [Boxes(torch.tensor(BOXES) * 1.0)])
    assert result.shape == (4, 6, 7, 7)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"strides": [8, 32, 64]}, r"each half the size of the one before; .* \[8, 32, 64\]"),
        ({"level_sides": [40]}, r"LEVEL_SIDES must be .* has maps \(3\), got \[40.0\]"),
        ({"level_sides": [181, 45]}, r"LEVEL_SIDES must be ascending"),
    ],
)
def test_levels_that_do_not_fit(overrides, message):
    with pytest.raises(ValueError, match=message):
        make_pooler(**overrides)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["MODEL.ZIP_DETECTOR.CHANNELS", 30], "CHANNELS must be a positive multiple of 4, got 30"),
        (["MODEL.ZIP_DETECTOR.NORM", "LN"], "ZIP_DETECTOR.NORM must be one of .* got 'LN'"),
        (
            ["MODEL.ZIP_DETECTOR.NUM_RES4_BLOCKS", 0, "MODEL.ZIP_DETECTOR.NUM_RES5_BLOCKS", 0],
            "nor both 0; got 0 and 0",
        ),
        (["MODEL.MASK_ON", True], "set MODEL.MASK_ON and MODEL.KEYPOINT_ON to False"),
        (["MODEL.ROI_HEADS.IN_FEATURES", ["p2"]], "MODEL.ROI_HEADS.IN_FEATURES"),
    ],
)
def test_settings_that_do_not_fit(overrides, message):
    with pytest.raises(ValueError, match=message) as error:
        build_heads(*overrides)
    assert "\n" not in str(error.value)


def test_paper_s_blocks_are_nine_of_resnet_101():
    with torch.device("meta"):
        blocks = FollowUpBlocks()
        convolutions = [
            (c.in_channels, c.out_channels, c.kernel_size[0], c.stride[0])
            for c in blocks.modules()
            if isinstance(c, nn.Conv2d)
        ]
        assert blocks(torch.zeros(2, 1024, 7, 7)).shape == (2, 2048)
        assert blocks.res5[0](torch.zeros(2, 1024, 7, 7)).shape == (2, 2048, 4, 4)
    res4 = [(1024, 256, 1, 1), (256, 256, 3, 1), (256, 1024, 1, 1)]
    res5a = [(1024, 2048, 1, 2), (1024, 512, 1, 1), (512, 512, 3, 2), (512, 2048, 1, 1)]
    res5b = [(2048, 512, 1, 1), (512, 512, 3, 1), (512, 2048, 1, 1)]
    assert convolutions == 6 * res4 + res5a + 2 * res5b
    assert sum(blocks.block_channels) == 6 * 1024 + 3 * 2048 == 12288
    assert all(isinstance(b.conv1.norm, FrozenBatchNorm2d) for b in (*blocks.res4, *blocks.res5))


def test_all_levels_share_the_blocks_and_the_predictions():
    heads = build_heads()
    names = {name.split(".")[0] for name, _ in heads.named_parameters()}
    assert names == {"box_pooler", "box_head", "box_predictor"}
    assert len(heads.box_pooler.projections) == 3
    # Maps that pool to the same on every level: the same RoI features whatever the level.
    with torch.no_grad():
        for projection in heads.box_pooler.projections:
            projection.weight.zero_()
            projection.bias.fill_(0.3)
    images = make_images((320, 320))
    with torch.no_grad():
        x = heads.box_pooler(
            list(make_features(images).values()), [Boxes(torch.tensor(BOXES) * 1.0)]
        )
        features = heads.box_head(x)
    assert torch.equal(features, features[:1].expand_as(features))
    assert features.std() > 0


def test_block_features_are_the_means_of_all_blocks():
    torch.manual_seed(0)
    blocks = FollowUpBlocks(channels=16, num_res4_blocks=2, num_res5_blocks=1, norm="BN")
    blocks.eval()
    x = torch.rand(3, 16, 7, 7)
    with torch.no_grad():
        first = blocks.res4[0](x)
        second = blocks.res4[1](first)
        third = blocks.res5[0](second)
        expected = torch.cat([y.flatten(2).mean(2) for y in (first, second, third)], dim=1)
        result, last = blocks.block_features(x), blocks(x)
    assert result.shape == (3, 16 + 16 + 32)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(last, expected[:, -32:])


def test_only_evaluation_asks_for_the_features_of_all_blocks():
    blocks = FollowUpBlocks(channels=16, num_res4_blocks=1, num_res5_blocks=1, all_blocks=True)
    assert blocks(torch.rand(2, 16, 7, 7)).shape == (2, 32)
    assert blocks.eval()(torch.rand(2, 16, 7, 7)).shape == (2, 48)


def test_every_key_of_the_detector_reaches_the_constructors(tmp_path):
    values = {"LEVEL_SIDES": (30.0, 60.0), "CHANNELS": 64, "NUM_RES4_BLOCKS": 2,
              "NUM_RES5_BLOCKS": 4, "RES5_STRIDE": 1, "NORM": "BN", "STRIDE_IN_1X1": True,
              "BOOSTING_FILE": str(tmp_path / "none.npz")}  # fmt: skip
    overrides = set_all("ZIP_DETECTOR", values)
    with pytest.raises(FileNotFoundError, match="none.npz"):
        build_roi_heads(make_cfg(None, *HEADS, *overrides), SHAPES)
    heads = build_heads(*overrides[:-2])
    assert heads.box_pooler.level_sides == [30.0, 60.0]
    assert [p.out_channels for p in heads.box_pooler.projections] == [64] * 3
    assert heads.box_head.block_channels == [64] * 2 + [128] * 4
    assert heads.box_head.res5[0].conv1.stride == heads.box_head.res5[0].conv2.stride == (1, 1)
    assert isinstance(heads.box_head.res4[0].conv1.norm, nn.BatchNorm2d)
    assert build_heads("MODEL.ZIP_DETECTOR.STRIDE_IN_1X1", True).box_head.res5[0].conv1.stride == (
        2,
        2,
    )
    heads = build_heads("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 5,
                        "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", 3,
                        "MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlign")  # fmt: skip
    (pooler, *_) = heads.box_pooler.level_poolers
    assert heads.box_pooler.output_size == (5, 5)
    assert (pooler.sampling_ratio, pooler.aligned) == (3, False)


def step(heads, boxes_of_images, gt_of_images, size=(320, 320)):
    """One training step: the losses, with gradients."""
    images = make_images(*[size] * len(boxes_of_images))
    proposals = [make_proposals(size, boxes) for boxes in boxes_of_images]
    targets = [make_instances(size, boxes) for boxes in gt_of_images]
    with EventStorage():
        _, losses = heads(images, make_features(images), proposals, targets)
    sum(losses.values()).backward()
    return losses


@pytest.mark.parametrize("norm", ["GN", "FrozenBN", ""])
@pytest.mark.parametrize(
    "boxes, gt",
    [
        ([BOXES, BOXES], [BOXES[:2], BOXES[1:]]),
        ([[[5, 5, 25, 25]]], [[]]),  # levels 2 and 3 have no RoI, the image no object
        ([BOXES, []], [[], []]),  # an image without proposals
        ([[[3, 3, 4, 4]]], [[[3, 3, 4, 4]]]),  # one pixel
        ([[], []], [[], []]),  # no RoI at all
    ],
)
def test_training_reaches_every_parameter_whatever_the_rois(norm, boxes, gt):
    heads = build_heads("MODEL.ZIP_DETECTOR.NORM", norm).train()
    losses = step(heads, boxes, gt)
    assert set(losses) == {"loss_cls", "loss_box_reg"}
    assert all(loss.isfinite() for loss in losses.values())
    missing = [n for n, p in heads.named_parameters() if p.grad is None]
    assert missing == []
    assert all(p.grad.isfinite().all() for p in heads.parameters())


def test_gradients_reach_the_maps_that_rois_are_pooled_from():
    heads = build_heads().train()
    images = make_images((320, 320))
    features = {n: x.requires_grad_() for n, x in make_features(images).items()}
    small = [[5, 5, 25, 25], [40, 40, 70, 70]]
    with EventStorage():
        _, losses = heads(
            images,
            features,
            [make_proposals((320, 320), small)],
            [make_instances((320, 320), small)],
        )
    sum(losses.values()).backward()
    assert features["zoom1"].grad.abs().sum() > 0
    # Connected, but no RoI is theirs.
    assert all(features[name].grad.abs().sum() == 0 for name in ("zoom2", "zoom3"))


def test_configured_box_loss_is_the_squared_l2_of_eq_6():
    cfg = make_cfg("Base-ZIP-Detector.yaml", *HEADS[4:], "MODEL.ROI_HEADS.POSITIVE_FRACTION", 1.0)
    torch.manual_seed(0)
    heads = build_roi_heads(cfg, SHAPES).train()
    nn.init.normal_(heads.box_predictor.bbox_pred.weight, std=0.1)
    # One RoI 10 pixels left of its object, whose width and height are 100: t* = (.1, 0, 0, 0).
    heads.proposal_append_gt = False
    images, features = make_images((320, 320)), None
    features = make_features(images)
    proposals = [make_proposals((320, 320), [[50, 50, 150, 150]])]
    with EventStorage():
        _, losses = heads(
            images, features, proposals, [make_instances((320, 320), [[60, 50, 160, 150]])]
        )
        with torch.no_grad():
            x = heads.box_pooler(list(features.values()), [proposals[0].proposal_boxes])
            _, deltas = heads.box_predictor(heads.box_head(x))
    expected = (deltas[0, :4] - torch.tensor([0.1, 0, 0, 0])).square().sum()
    torch.testing.assert_close(losses["loss_box_reg"], expected, rtol=1e-4, atol=1e-6)
    assert expected > 1e-3


def detect(heads, images, features, proposals):
    with torch.no_grad():
        return heads.eval()(images, features, proposals)[0]


def make_marked_maps(image_size, boxes, classes, num_classes):
    """Maps of one image: noise, and on each object what marks its class."""
    generator = torch.Generator().manual_seed(7)
    maps = {}
    for name, (stride, channels) in LEVELS.items():
        marks = torch.randn(num_classes, channels, generator=generator)
        height, width = image_size[0] // stride, image_size[1] // stride
        x = 0.5 * torch.randn(1, channels, height, width, generator=generator)
        for box, label in zip((boxes / stride).round().long().tolist(), classes, strict=True):
            x[0, :, box[1] : box[3], box[0] : box[2]] += marks[label][:, None, None]
        maps[name] = x
    return maps


def shift(boxes, share, seed):
    """Boxes moved by up to a share of their sides."""
    generator = torch.Generator().manual_seed(seed)
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    return boxes + share * sides * (2 * torch.rand(boxes.shape, generator=generator) - 1)


@pytest.mark.slow
def test_heads_learn_classes():
    cfg = make_cfg("shapes/zip_detector.yaml", "MODEL.ROI_HEADS.NUM_CLASSES", 4,
                   "MODEL.ZIP_DETECTOR.CHANNELS", 64)  # fmt: skip
    torch.manual_seed(0)
    heads = build_roi_heads(cfg, SHAPES).train()
    size, classes = (384, 512), torch.arange(12) % 4
    # Twelve objects on a grid, of sides 16, 48 and 96 pixels: all three levels.
    corners = 128.0 * torch.stack([torch.arange(12) % 4, torch.arange(12) // 4], dim=1)
    sides = torch.tensor([16.0, 48, 96]).repeat_interleave(4)[:, None]
    boxes = torch.cat([corners, corners + sides], dim=1)
    assert set(heads.box_pooler.assign_levels(boxes).tolist()) == {0, 1, 2}
    images = make_images(size)
    maps = make_marked_maps(size, boxes, classes, 4)
    targets = make_instances(size, boxes.tolist())
    targets.gt_classes = classes
    around = torch.cat([shift(boxes, 0.1, 1), shift(boxes, 1.0, 2), shift(boxes, 1.0, 3)])
    # What moved by its side may have turned inside out.
    around = torch.cat(
        [around[:, :2].minimum(around[:, 2:]), around[:, :2].maximum(around[:, 2:])], 1
    )
    proposals = make_proposals(size, around.clamp(min=0).tolist())
    optimizer = torch.optim.SGD(
        heads.parameters(), cfg.SOLVER.BASE_LR, cfg.SOLVER.MOMENTUM,
        weight_decay=cfg.SOLVER.WEIGHT_DECAY,
    )  # fmt: skip
    for _ in range(100):
        with EventStorage():
            _, losses = heads(images, maps, [proposals], [targets])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    # Other boxes of the same objects.
    with torch.no_grad():
        pooled = heads.box_pooler(list(maps.values()), [Boxes(shift(boxes, 0.1, 4).clamp(min=0))])
        logits, _ = heads.box_predictor(heads.box_head(pooled))
    assert (logits.argmax(dim=1) == classes).float().mean() > 0.7


def louder(heads):
    """Larger weights, so that scores and boxes differ as they do after training."""
    nn.init.normal_(heads.box_predictor.cls_score.weight, std=0.3)
    nn.init.normal_(heads.box_predictor.bbox_pred.weight, std=0.1)
    return heads


def test_evaluation_without_proposals_and_with_one_pixel():
    heads = louder(build_heads())
    images = make_images((320, 320), (320, 320))
    proposals = [make_proposals((320, 320), []), make_proposals((320, 320), [[3, 3, 4, 4]])]
    none, one = detect(heads, images, make_features(images), proposals)
    assert len(none) == 0 and none.pred_boxes.tensor.shape == (0, 4)
    assert one.scores.isfinite().all()
    none, other = detect(heads, images, make_features(images), [proposals[0]] * 2)
    assert len(none) == len(other) == 0


@pytest.mark.parametrize("size", [(96, 128), (100, 150)])
def test_an_image_has_the_same_detections_alone_and_in_a_padded_batch(size):
    # Boxes that end at the right and the bottom border, where the padding begins.
    height, width = size
    boxes = [[width - 90, height - 80, width, height], [width - 20, height - 20, width, height],
             [0, 0, width, height], [10, 10, 60, 60]]  # fmt: skip
    heads = louder(build_heads())
    alone, batch = make_images(size), make_images(size, (256, 288))
    features = {n: 10 * x for n, x in make_features(batch).items()}
    alone_features = {
        n: x[:1, :, : -(-height // 32) * 32 // s, : -(-width // 32) * 32 // s]
        for (n, x), (s, _) in zip(features.items(), LEVELS.values(), strict=True)
    }
    # The backbone's maps are zero in the padding.
    for maps in (features, alone_features):
        for (s, _), x in zip(LEVELS.values(), maps.values(), strict=True):
            x[0, :, -(-height // s) :] = 0
            x[0, :, :, -(-width // s) :] = 0
    proposals = make_proposals(size, boxes)
    (only,) = detect(heads, alone, alone_features, [proposals])
    first, _ = detect(heads, batch, features, [proposals, make_proposals((256, 288))])
    assert len(only) > 0
    torch.testing.assert_close(first.pred_boxes.tensor, only.pred_boxes.tensor)
    torch.testing.assert_close(first.scores, only.scores)


def test_bfloat16_autocast():
    heads = louder(build_heads())
    images = make_images((320, 320))
    features = make_features(images)
    (expected,) = detect(heads, images, features, [make_proposals((320, 320))])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = {n: x.bfloat16() for n, x in features.items()}
        (result,) = detect(heads, images, half, [make_proposals((320, 320))])
        # bfloat16 has no 203.3, only 203 and 204: a tenth of a bin of the first box.
        boxes = [Boxes(torch.tensor([[203.3, 97.7, 240.9, 130.4], [131.7, 150.6, 290.1, 260.8]]))]
        pooled = heads.box_pooler(list(half.values()), boxes)
    assert pooled.dtype == torch.bfloat16 and len(result) > 0
    # Values are rounded, and boxes are not.
    reference = heads.box_pooler([x.float() for x in half.values()], boxes)
    assert (pooled - reference).abs().max() < 0.02 * reference.abs().max()
    best = expected.scores.max()
    assert (result.scores.max() - best).abs() < 0.1
    heads.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = step(heads, [BOXES, []], [BOXES[:2], []])
    assert all(loss.isfinite() for loss in losses.values())


def test_state_dict_round_trip_and_explicit_constructor():
    cfg = make_cfg(None, *HEADS)
    heads = louder(build_heads())
    explicit = ZIPHeads(**ZIPHeads.from_config(cfg, SHAPES))
    explicit.load_state_dict(heads.state_dict())
    images = make_images((320, 320))
    a, b = (
        detect(h, images, make_features(images), [make_proposals((320, 320))])[0]
        for h in (heads, explicit)
    )
    assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
    assert torch.equal(a.scores, b.scores) and len(a) > 0


def build_detector(*overrides, config="zip_detector.yaml"):
    torch.manual_seed(0)
    return build_model(make_cfg(config, *SMALL, *overrides))


def make_input(size=(96, 128), boxes=((8, 8, 40, 72), (60, 10, 120, 90))):
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, *size), generator=generator).float()
    return {"image": image, "instances": make_instances(size, boxes),
            "height": size[0], "width": size[1]}  # fmt: skip


def test_detector_takes_300_proposals():
    cfg = make_cfg("zip_detector.yaml")
    assert cfg.MODEL.ZIP.POST_NMS_TOPK_TEST == 300 and cfg.MODEL.ROI_HEADS.NUM_CLASSES == 20
    assert not cfg.TEST.AUG.ENABLED and cfg.MODEL.PROPOSAL_GENERATOR.PROPOSALS_IN_TRAINING


def test_detections_from_pixels_do_not_depend_on_the_padding_of_the_batch():
    model = build_detector("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0).eval()
    louder(model.roi_heads)
    with torch.no_grad():
        alone = model([make_input((75, 100))])[0]["instances"]
        together = model([make_input((75, 100)), make_input((128, 160))])[0]["instances"]
    assert len(alone) > 0
    # Of equal scores up to rounding, either may come first.
    torch.testing.assert_close(together.scores[:20], alone.scores[:20], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        together.pred_boxes.tensor[:5], alone.pred_boxes.tensor[:5], rtol=1e-2, atol=0.1
    )


def test_detectron2s_test_time_augmentation_takes_the_detector():
    opts = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "TEST.AUG.MIN_SIZES", (64, 96)]
    model = build_detector(*opts).eval()
    louder(model.roi_heads)
    wrapper = GeneralizedRCNNWithTTA(make_cfg("zip_detector.yaml", *SMALL, *opts), model)
    with torch.no_grad():
        (output,) = wrapper([make_input()])
    instances = output["instances"]
    assert instances.image_size == (96, 128) and len(instances) > 0
    assert (instances.scores[1:] <= instances.scores[:-1]).all()
