"""Small networks of each kind that leaves Python, whose boxes have scores far apart."""

import torch
from detectron2.modeling import build_model
from torch import nn

from d2proposals.deployment.image_network import noise_image
from tests.common import make_cfg

SMALL_FPN = (
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.RESNETS.STEM_OUT_CHANNELS", 16),
    *("MODEL.FPN.OUT_CHANNELS", 16, "MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.NORM", "BN"),
    *("MODEL.WEIGHTS", "", "MODEL.BACKBONE.FREEZE_AT", 0),
)
SMALL_HEADS = (
    *("MODEL.RPN.POST_NMS_TOPK_TEST", 200, "MODEL.RPN.PRE_NMS_TOPK_TEST", 300),
    *("MODEL.SCRPN.POST_NMS_TOPK_TEST", 200, "MODEL.SCRPN.PRE_NMS_TOPK_TEST", 300),
    *("MODEL.SCRPN.HEAD_CHANNELS", 16, "MODEL.ZIP.HEAD_CHANNELS", 16),
    *("MODEL.ZIP.PRE_NMS_TOPK_TEST", 300, "MODEL.ZIP.POST_NMS_TOPK_TEST", 200),
    *("MODEL.ZIP.MULTI_NMS_THRESHOLDS", (0.8, 0.6, 0.5), "MODEL.ZIP.MULTI_NMS_TOPKS", (300, 60, 9)),
    *("MODEL.ROI_HEADS.NUM_CLASSES", 3, "MODEL.ROI_BOX_HEAD.FC_DIM", 32),
)
SMALL_INCEPTION = (
    *("MODEL.BN_INCEPTION.WIDTH_FACTOR", 0.05, "MODEL.ZOOM_NETWORK.MIRROR_DEPTHS", (1, 1, 0)),
    *("MODEL.BN_INCEPTION.NORM", "BN", "MODEL.ZOOM_NETWORK.NORM", "BN"),
    *("MODEL.ZIP_DETECTOR.CHANNELS", 16, "MODEL.ZIP_DETECTOR.NORM", "BN"),
)
# Configuration and overrides by name.
NETWORKS = {
    "RPN": ("shapes/rpn_only.yaml", SMALL_FPN),
    "SC-RPN": ("shapes/sc_rpn_only.yaml", SMALL_FPN),
    "ZIP, FPN": ("zip_fpn_only.yaml", SMALL_FPN),
    "ZIP, BN-Inception": ("shapes/zip_rpn_only.yaml", SMALL_INCEPTION),
    "Faster R-CNN, RPN": ("shapes/faster_rcnn_rpn.yaml", SMALL_FPN),
    "Faster R-CNN, SC-RPN": ("shapes/faster_rcnn_sc_rpn.yaml", SMALL_FPN),
    "Faster R-CNN, ZIP": (
        "faster_rcnn_zip.yaml",
        (*SMALL_FPN, "MODEL.ROI_HEADS.IN_FEATURES", ["p3", "p4", "p5"]),
    ),
    "Double-Head R-CNN, SC-RPN": (
        "shapes/double_head_rcnn_sc_rpn.yaml",
        (*SMALL_FPN, "MODEL.ROI_BOX_HEAD.CONV_DIM", 32),
    ),
    "ZIP's detector": ("shapes/zip_detector.yaml", SMALL_INCEPTION),
}


def small_cfg(name):
    config, overrides = NETWORKS[name]
    return make_cfg(config, *overrides, *SMALL_HEADS)


def small_network(name):
    """A network of NETWORKS in evaluation mode."""
    torch.manual_seed(0)
    model = build_model(small_cfg(name))
    # Statistics of an image, without which a deep network of random weights says nothing.
    for module in model.backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        image = noise_image((320, 320))
        model.backbone((image - model.pixel_mean)[None] / model.pixel_std)
    model.eval()
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and not name.startswith("backbone"):
            # Offsets of an untrained network would throw boxes about, and enlarge each rounding;
            # probabilities of one would be equal to all digits.
            gain = 0.1 if name.endswith(("deltas", "bbox_pred", "class_logits")) else 1.0
            nn.init.normal_(module.weight, std=gain * module.weight[0].numel() ** -0.5)
    return model
