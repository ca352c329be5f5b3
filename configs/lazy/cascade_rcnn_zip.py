"""Cascade R-CNN with ZIP on an FPN."""

from .common.generators import zip_rpn
from .common.hosts import cascade_heads, faster_rcnn
from .common.training import dataloader as coco
from .common.training import job, multi_step, sgd

model = faster_rcnn(
    zip_rpn(("p3", "p4", "p5"), (256,) * 3, post_nms_topk=(300, 300), pre_nms_topk=(2000, 6000)),
    cascade_heads(),
)
dataloader = coco(detects=True)
optimizer = sgd()
lr_multiplier = multi_step()
train = job("cascade_rcnn_zip")
