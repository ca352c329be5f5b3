"""Cascade R-CNN with SC-RPN."""

from .common.generators import sc_rpn
from .common.hosts import cascade_heads, faster_rcnn
from .common.training import dataloader as coco
from .common.training import job, multi_step, sgd

model = faster_rcnn(sc_rpn(loss_weight=0.7, post_nms_topk=(1000, 1000)), cascade_heads())
dataloader = coco(4, (800,), detects=True)
optimizer = sgd(0.005, clip_norm=35.0)
lr_multiplier = multi_step((234532, 322482), 351798, warmup=500)
train = job("cascade_rcnn_sc_rpn", 351798)
