"""DeepMask alone."""

from .common.generators import deepmask
from .common.hosts import RGB, image_backbone, proposal_network
from .common.training import dataloader as coco
from .common.training import job, multi_step, sgd

model = proposal_network(image_backbone(), deepmask(RGB), RGB)
dataloader = coco(8, (), 0, flips=False, image_format="RGB", use_instance_mask=True)
optimizer = sgd(0.001, weight_decay=0.00005)
lr_multiplier = multi_step((), 500000, warmup=0)
train = job("deepmask_rpn_only", 500000, weights="")
