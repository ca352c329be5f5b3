"""Cascade R-CNN with SPOP."""

from .common.generators import spop
from .common.hosts import BGR, cascade_heads, faster_rcnn
from .common.training import dataloader as coco
from .common.training import job, multi_step, sgd

model = faster_rcnn(
    spop(BGR, native_short_edge=480, trains_at_native_size=True, post_nms_topk=(1000, 1000)),
    cascade_heads(),
)
dataloader = coco(detects=True, use_instance_mask=True, instance_mask_format="bitmask")
optimizer = sgd(generator_lr_factor=0.05, clip_norm=10.0)
lr_multiplier = multi_step()
train = job("cascade_rcnn_spop")
