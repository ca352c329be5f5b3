"""ViTDet with SC-RPN in the place of RPN: one line."""

from .common.generators import sc_rpn
from .vitdet_rpn import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.proposal_generator = sc_rpn(loss_weight=0.7, post_nms_topk=(300, 300))
train.output_dir = "./output/lazy/vitdet_sc_rpn"
