"""Faster R-CNN with SC-RPN, and the heads of its table."""

from .common.generators import sc_rpn
from .common.hosts import box_heads, faster_rcnn
from .common.training import dataloader as coco
from .common.training import job, multi_step, sgd

model = faster_rcnn(
    sc_rpn(loss_weight=0.7, post_nms_topk=(300, 300)),
    box_heads(iou=0.65, batch_size=256, weights=(25.0, 25.0, 12.5, 12.5)),
)
dataloader = coco(4, (800,), detects=True)
optimizer = sgd(0.005, clip_norm=35.0)
lr_multiplier = multi_step((234532, 322482), 351798, warmup=500)
train = job("faster_rcnn_sc_rpn", 351798)
