"""Faster R-CNN with DeepMask."""

from .common.generators import deepmask
from .common.hosts import BGR, faster_rcnn
from .common.training import dataloader as coco
from .common.training import job, multi_step, sgd

model = faster_rcnn(deepmask(BGR, native_short_edge=480, nms_thresh=0.8, batch_size_per_image=2))
dataloader = coco(detects=True, use_instance_mask=True)
optimizer = sgd(generator_lr_factor=0.05)
lr_multiplier = multi_step()
train = job("faster_rcnn_deepmask")
