"""ZIP alone, on the zoom network. dyTrainScale is the YAML configuration's."""

from .common.generators import zip_rpn
from .common.hosts import INCEPTION_BGR, proposal_network, zoom_network
from .common.training import dataloader as coco
from .common.training import job, multi_step, sgd

model = proposal_network(zoom_network(), zip_rpn(), INCEPTION_BGR)
dataloader = coco(4, (600,), 600, max_size=1000, flips=False)
optimizer = sgd(0.0001, weight_decay=0.0005)
lr_multiplier = multi_step(range(7000, 231001, 7000), 236000, gamma=0.5)
train = job("zip_rpn_only", 236000, weights="")
