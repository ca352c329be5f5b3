"""SPOP alone. The warp to 513x513 and the clipping are the YAML configuration's."""

from .common.generators import spop
from .common.hosts import RGB, image_backbone, proposal_network
from .common.training import dataloader as coco
from .common.training import job, multi_step, sgd

model = proposal_network(image_backbone(), spop(RGB, post_nms_topk=(2000, 2000)), RGB)
dataloader = coco(8, test_side=0, image_format="RGB", use_instance_mask=True)
optimizer = sgd(0.001, weight_decay=0.0005)
lr_multiplier = multi_step((28388, 56775), 85163)
train = job("spop_rpn_only", 85163, weights="")
