"""Every row of the paper's Tables 1 and 2 (and the lambda of Eq. 8) is a matter of keys."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from tests.common import make_cfg, make_instances

SMALL = ["MODEL.BN_INCEPTION.WIDTH_FACTOR", 0.125, "MODEL.ZIP.HEAD_CHANNELS", 16,
         "MODEL.BN_INCEPTION.NORM", "GN", "MODEL.ZOOM_NETWORK.NORM", "GN"]  # fmt: skip
BASELINE = ["MODEL.ZIP.GRAY_CLASS.ENABLED", False, "MODEL.ZIP.EQUILIBRIUM.ENABLED", False,
            "INPUT.DY_TRAIN_SCALE.ENABLED", False, "MODEL.ZIP.POSITIVE_IOU", 0.7,
            "MODEL.ZIP.NEGATIVE_IOU", 0.3, "MODEL.ZIP.LOW_QUALITY_MATCH", True,
            "MODEL.ZIP.BATCH_SIZE_PER_IMAGE", 256,
            "MODEL.ZIP.BATCH_SIZE_PER_CLASS", 128]  # fmt: skip
NO_MAD = ["MODEL.ZOOM_NETWORK.MAD.TYPE", "none"]
ZOOM_OUT = ["MODEL.ZOOM_NETWORK.ZOOM_IN", False, *NO_MAD]
ALL_SIZES = ["MODEL.ANCHOR_GENERATOR.SIZES", [[16, 32, 64, 128, 256, 512]]]
TWO_BANDS = ["MODEL.ZIP.POSITIVE_IOU", 0.6, "MODEL.ZIP.NEGATIVE_IOU", 0.25]

# Row -> (overrides, anchors per cell of each level, channels of each level at full width).
ROWS = {
    "1a zoom-out": (
        [*BASELINE, *ZOOM_OUT, *ALL_SIZES, "MODEL.ZIP.IN_FEATURES", ["zoom3"]],
        [30],
        [1024],
    ),
    "1b split": ([*BASELINE, *ZOOM_OUT], [10, 10, 10], [320, 608, 1024]),
    "1c split, all": ([*BASELINE, *ZOOM_OUT, *ALL_SIZES], [30, 30, 30], [320, 608, 1024]),
    "1d ZIP": ([*BASELINE, *NO_MAD], [10, 10, 10], [640, 1216, 1024]),
    "1e deeper": (
        [*BASELINE, *ZOOM_OUT, "MODEL.BN_INCEPTION.EXTRA_BLOCKS", (2, 4, 2)],
        [10, 10, 10],
        [320, 608, 1024],
    ),
    "2 dyTrainScale": (
        [*BASELINE, *NO_MAD, "INPUT.DY_TRAIN_SCALE.ENABLED", True],
        [10, 10, 10],
        [640, 1216, 1024],
    ),
    "2 equilibrium": (
        [*BASELINE, *NO_MAD, "MODEL.ZIP.EQUILIBRIUM.ENABLED", True],
        [10, 10, 10],
        [640, 1216, 1024],
    ),
    "2 grayCls": (
        [*BASELINE, *NO_MAD, *TWO_BANDS, "MODEL.ZIP.GRAY_CLASS.ENABLED", True],
        [10, 10, 10],
        [640, 1216, 1024],
    ),
    "2 all": (NO_MAD, [10, 10, 10], [640, 1216, 1024]),
    "2 all + MAD": ([], [10, 10, 10], [640, 1216, 1024]),
    "2 spatial MAD": (
        ["MODEL.ZOOM_NETWORK.MAD.TYPE", "spatial"], [10, 10, 10], [640, 1216, 1024],
    ),
    "2 ER vector": (
        ["MODEL.ZOOM_NETWORK.MAD.TYPE", "excitation"], [10, 10, 10], [640, 1216, 1024],
    ),
    "lambda 4": (["MODEL.ZOOM_NETWORK.MAD.LAMBDA", 4], [10, 10, 10], [1280, 2432, 1024]),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_row_builds_trains_a_step_and_proposes(row):
    overrides, num_anchors, _ = ROWS[row]
    torch.manual_seed(0)
    model = build_model(make_cfg("zip_rpn_only.yaml", *overrides, *SMALL))
    generator = model.proposal_generator
    assert generator.anchor_generator.num_anchors == num_anchors
    has_gray = not (row.startswith("1") or row in ("2 dyTrainScale", "2 equilibrium"))
    assert generator.heads.heads[0].num_classes == (3 if has_gray else 2)
    image = torch.randint(0, 256, (3, 128, 160)).float()
    boxes = [[8, 8, 40, 72], [60, 10, 150, 120]]
    with EventStorage() as storage:
        losses = model([{"image": image, "instances": make_instances((128, 160), boxes)}])
        counts = {name: value for name, (value, _) in storage.latest().items()}
    sum(losses.values()).backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    # Table 1 (a) reads F3 alone; nothing in it is left over.
    assert without == []
    if not has_gray:
        assert counts["zip/num_gray_anchors"] == 0
    if not generator.sampler.equilibrium:  # negatives fill the batch
        assert counts["zip/num_neg_anchors"] > 2 * counts["zip/num_pos_anchors"]
    model.eval()
    with torch.no_grad():
        (output,) = model([{"image": image, "height": 128, "width": 160}])
    assert len(output["proposals"]) > 0


@pytest.mark.parametrize("row", ROWS)
def test_row_has_the_paper_s_channels_at_full_width(row):
    overrides, _, channels = ROWS[row]
    with torch.device("meta"):
        model = build_model(make_cfg("zip_rpn_only.yaml", *overrides, "MODEL.DEVICE", "meta"))
    shapes = model.backbone.output_shape()
    assert [shapes[f].channels for f in model.proposal_generator.in_features] == channels
