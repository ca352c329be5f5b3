"""Faster R-CNN with Detectron2's RPN."""

from .common.generators import rpn
from .common.hosts import faster_rcnn
from .common.training import dataloader as coco
from .common.training import job, multi_step, sgd

model = faster_rcnn(rpn())
model.proposal_generator.post_nms_topk = (1000, 1000)
dataloader = coco(detects=True)
optimizer = sgd()
lr_multiplier = multi_step()
train = job("faster_rcnn_rpn")
