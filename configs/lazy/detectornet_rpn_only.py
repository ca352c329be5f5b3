"""DetectorNet alone. AdaGrad is the YAML configuration's."""

from .common.generators import detectornet
from .common.hosts import RGB, image_backbone, proposal_network
from .common.training import dataloader as coco
from .common.training import job, multi_step, sgd

model = proposal_network(image_backbone(), detectornet(RGB), RGB)
dataloader = coco(16, (), 0, image_format="RGB")
optimizer = sgd(0.001, weight_decay=0.0)
lr_multiplier = multi_step((), 19532)
train = job("detectornet_rpn_only", 19532, weights="")
