"""SC-RPN alone."""

from .common.generators import sc_rpn
from .common.hosts import proposal_network, resnet_fpn
from .common.training import dataloader as coco
from .common.training import job, multi_step, sgd

model = proposal_network(resnet_fpn(), sc_rpn())
dataloader = coco(batch=4, train_sides=(800,))
optimizer = sgd(0.005, clip_norm=35.0)
lr_multiplier = multi_step((234532, 322482), 351798, warmup=500)
train = job("sc_rpn_only", 351798)
