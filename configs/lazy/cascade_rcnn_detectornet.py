"""Cascade R-CNN with DetectorNet."""

from .common.generators import detectornet
from .common.hosts import BGR, cascade_heads, faster_rcnn
from .common.training import dataloader as coco
from .common.training import job, multi_step, sgd

model = faster_rcnn(
    detectornet(BGR, topk_per_scale=100, min_coverage=-1.0, nms_type="iou"), cascade_heads()
)
dataloader = coco(detects=True)
optimizer = sgd(generator_lr_factor=0.05)
lr_multiplier = multi_step()
train = job("cascade_rcnn_detectornet")
