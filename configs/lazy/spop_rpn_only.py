"""SPOP alone. The clipping is the YAML configuration's."""

from .common.generators import spop
from .common.hosts import RGB, image_backbone, proposal_network
from .common.training import dataloader as coco
from .common.training import job, multi_step, sgd

model = proposal_network(image_backbone(), spop(RGB, post_nms_topk=(2000, 2000)), RGB)
dataloader = coco(
    8,
    test_side=0,
    warp_size=(513, 513),
    image_format="RGB",
    use_instance_mask=True,
    instance_mask_format="bitmask",
)
dataloader["proposal_evaluator"].limits = [1, 10, 100, 300, 500, 1000, 2000]
optimizer = sgd(0.001, weight_decay=0.0005)
lr_multiplier = multi_step((28388, 56775), 85163)
train = job("spop_rpn_only", 85163, weights="")
