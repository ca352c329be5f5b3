"""ViTDet with SC-RPN in the place of RPN: one line, and the bound of its gradients."""

from .common.generators import sc_rpn
from .common.training import sgd
from .vitdet_rpn import dataloader, lr_multiplier, model, train  # noqa: F401

model.proposal_generator = sc_rpn(loss_weight=0.7, post_nms_topk=(300, 300))
optimizer = sgd(clip_norm=35.0)
train.output_dir = "./output/lazy/vitdet_sc_rpn"
