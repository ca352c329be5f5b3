"""Cascade R-CNN with Detectron2's RPN."""

from .common.generators import rpn
from .common.hosts import cascade_heads, faster_rcnn
from .common.training import dataloader as coco
from .common.training import job, multi_step, sgd

model = faster_rcnn(rpn(), cascade_heads())
model.proposal_generator.post_nms_topk = (2000, 1000)
dataloader = coco(detects=True)
optimizer = sgd()
lr_multiplier = multi_step()
train = job("cascade_rcnn_rpn")
