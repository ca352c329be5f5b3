"""The baseline, Detectron2's RPN, alone."""

from .common.generators import rpn
from .common.hosts import proposal_network, resnet_fpn
from .common.training import dataloader as coco
from .common.training import job, multi_step, sgd

model = proposal_network(resnet_fpn(), rpn())
dataloader = coco()
optimizer = sgd()
lr_multiplier = multi_step()
train = job("rpn_only")
