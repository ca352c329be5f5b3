"""Faster R-CNN on ViTDet-B, Detectron2's plain vision transformer. It takes the package timm."""

from functools import partial

from detectron2.config import LazyCall as L
from detectron2.modeling import SimpleFeaturePyramid, ViT
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from torch import nn

from .common.generators import rpn
from .common.hosts import RGB, faster_rcnn
from .common.training import dataloader as coco
from .common.training import job, multi_step, sgd

backbone = L(SimpleFeaturePyramid)(
    net=L(ViT)(
        img_size=1024,
        patch_size=16,
        embed_dim=768,
        depth=12,
        num_heads=12,
        drop_path_rate=0.1,
        window_size=14,
        mlp_ratio=4,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        # The other blocks, 2, 5, 8 and 11, have global attention.
        window_block_indexes=[0, 1, 3, 4, 6, 7, 9, 10],
        residual_block_indexes=[],
        use_rel_pos=True,
        out_feature="last_feat",
    ),
    in_feature="${.net.out_feature}",
    out_channels=256,
    scale_factors=(4.0, 2.0, 1.0, 0.5),
    top_block=L(LastLevelMaxPool)(),
    norm="LN",
    square_pad=1024,
)
model = faster_rcnn(rpn(), backbone=backbone)
model.proposal_generator.post_nms_topk = (1000, 1000)
model.update(pixel_mean=RGB["model_mean"], pixel_std=RGB["model_std"], input_format="RGB")
# No image is larger than the square it is padded to.
dataloader = coco(max_size=backbone.square_pad, detects=True, image_format="RGB")
optimizer = sgd()
lr_multiplier = multi_step()
train = job("vitdet_rpn", weights="")
