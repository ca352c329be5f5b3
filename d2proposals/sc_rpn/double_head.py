"""Double-Head R-CNN, one of the detectors that SC-RPN is compared in (Table IX).

Source: Y. Wu, Y. Chen, L. Yuan, Z. Liu, L. Wang, H. Li and Y. Fu, "Rethinking Classification and
Localization for Object Detection", CVPR 2020 (Double-Head): a fully connected head classifies, a
convolution head regresses, and both losses have a weight.

SC-RPN's paper names its code base and nothing else about this detector. So the sizes of the heads,
the weights of the losses and the larger boxes that the convolution head sees are those of that code
base.

    RoI features ----------------> 2 fully connected layers ----------> class scores
    RoI features of larger boxes -> residual blocks, average pooling --> box deltas

Shape shorthand in this module:

    M: number of RoIs in the batch
    C: channels of the feature maps
    P: side of the pooled features
    F, V: features that the fully connected and the convolution head return
"""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling.backbone.resnet import BottleneckBlock
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import (
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
    StandardROIHeads,
)
from detectron2.structures import Boxes, ImageList, Instances
from fvcore.nn import weight_init
from torch import nn

from ..proposals.image_extent import extend_edges, stack_image_sizes, valid_cells


class EnlargingPooler(nn.Module):
    """Pools larger boxes around those that it is given, from one map."""

    def __init__(self, pooler: nn.Module, scale: float):
        """
        Args:
            pooler: of (M, 5) boxes as ``torchvision.ops.roi_align`` takes them.
            scale: sides of the larger box, relative to the box's.
        """
        super().__init__()
        self.pooler = pooler
        self.scale = scale

    def forward(self, x: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) maps and (M, 5) image, XYXY -> (M, C, P, P)."""
        low, high = boxes[:, 1:3], boxes[:, 3:]
        center, half_side = (low + high) / 2, (high - low) * (self.scale / 2)
        return self.pooler(
            x, torch.cat([boxes[:, :1], center - half_side, center + half_side], dim=1)
        )


class TwoExtentPooler(nn.Module):
    """Pools each box for the classification, and a larger one around it for the regression.

    Both come from the same feature map, that of the box's size, as in the paper's code base.
    """

    def __init__(self, pooler: ROIPooler, scale: float):
        """
        Args:
            pooler: of both.
            scale: sides of the larger box, relative to the box's.

        Raises:
            ValueError: the scale is not positive.
        """
        super().__init__()
        if not scale > 0:
            raise ValueError(f"MODEL.DOUBLE_HEAD.REGRESSION_SCALE must be positive, got {scale}.")
        self.pooler = pooler
        self.larger = copy.deepcopy(pooler)
        self.larger.level_poolers = nn.ModuleList(
            EnlargingPooler(level_pooler, scale) for level_pooler in pooler.level_poolers
        )

    def forward(self, x: list[torch.Tensor], box_lists: list[Boxes]) -> torch.Tensor:
        """Features (M, 2 * C, P, P), of the boxes and then of the larger boxes."""
        return torch.cat([self.pooler(x, box_lists), self.larger(x, box_lists)], dim=1)


class WideningBlock(nn.Module):
    """Residual block that raises the number of channels: 3x3, 1x1 and a 1x1 shortcut."""

    def __init__(self, in_channels: int, out_channels: int, norm: str):
        super().__init__()
        sizes = {
            "conv1": (in_channels, in_channels, 3, nn.ReLU()),
            "conv2": (in_channels, out_channels, 1, None),
            "shortcut": (in_channels, out_channels, 1, None),
        }
        for name, (channels, outputs, kernel_size, activation) in sizes.items():
            conv = Conv2d(
                channels,
                outputs,
                kernel_size,
                padding=kernel_size // 2,
                bias=False,
                norm=get_norm(norm, outputs),
                activation=activation,
            )
            weight_init.c2_msra_fill(conv)
            self.add_module(name, conv)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(M, C, P, P) -> (M, V, P, P)."""
        return torch.relu_(self.conv2(self.conv1(x)) + self.shortcut(x))


@ROI_BOX_HEAD_REGISTRY.register()
class DoubleBoxHead(nn.Module):
    """Both heads beside each other."""

    @configurable
    def __init__(
        self, input_shape: ShapeSpec, *, fc_dims: list[int], num_conv: int, conv_dim: int, norm: str
    ):
        """
        Args:
            input_shape: of the pooled features of one extent.
            fc_dims: features of each fully connected layer.
            num_conv: bottleneck blocks behind the first residual block.
            conv_dim: channels of the residual blocks.
            norm: of the residual blocks, a name of Detectron2's ``get_norm``.

        Raises:
            ValueError: there is no fully connected layer, or too few channels.
        """
        super().__init__()
        if not fc_dims or conv_dim < 4:
            raise ValueError(
                "DoubleBoxHead needs MODEL.ROI_BOX_HEAD.NUM_FC of at least 1 and CONV_DIM of at "
                f"least 4, got {len(fc_dims)} and {conv_dim}."
            )
        self.fc_head = FastRCNNConvFCHead(input_shape, conv_dims=[], fc_dims=fc_dims)
        self.conv_head = nn.Sequential(WideningBlock(input_shape.channels, conv_dim, norm))
        for _ in range(num_conv):
            self.conv_head.append(
                BottleneckBlock(
                    conv_dim, conv_dim, bottleneck_channels=conv_dim // 4, stride=1, norm=norm
                )
            )
        self.output_shape = ShapeSpec(channels=fc_dims[-1] + conv_dim)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        node = cfg.MODEL.ROI_BOX_HEAD
        return {
            "input_shape": input_shape,
            "fc_dims": [node.FC_DIM] * node.NUM_FC,
            "num_conv": node.NUM_CONV,
            "conv_dim": node.CONV_DIM,
            "norm": node.NORM,
        }

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(M, 2 * C, P, P) of a :class:`TwoExtentPooler` -> (M, F + V)."""
        for_classes, for_boxes = x.chunk(2, dim=1)
        regression = self.conv_head(for_boxes).mean(dim=(2, 3))
        return torch.cat([self.fc_head(for_classes), regression], dim=1)


class DoubleHeadOutputLayers(FastRCNNOutputLayers):
    """Class scores of the first F features and box deltas of the others."""

    @configurable
    def __init__(self, input_shape: ShapeSpec, *, num_class_features: int, **settings):
        """
        Args:
            input_shape: of the features, F + V.
            num_class_features: F.
            settings: of FastRCNNOutputLayers.
        """
        super().__init__(input_shape, **settings)
        self.sizes = [num_class_features, input_shape.channels - num_class_features]
        # With the initial weights of the layers that they replace.
        self.cls_score = _linear(self.sizes[0], self.cls_score.out_features, std=0.01)
        self.bbox_pred = _linear(self.sizes[1], self.bbox_pred.out_features, std=0.001)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        ret = super().from_config(cfg, input_shape)
        ret["num_class_features"] = cfg.MODEL.ROI_BOX_HEAD.FC_DIM
        ret["loss_weight"]["loss_cls"] = cfg.MODEL.DOUBLE_HEAD.CLS_LOSS_WEIGHT
        return ret

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(M, F + V) -> class scores (M, classes + 1) and deltas (M, classes * 4)."""
        for_classes, for_boxes = x.split(self.sizes, dim=1)
        return self.cls_score(for_classes), self.bbox_pred(for_boxes)


@ROI_HEADS_REGISTRY.register()
class DoubleHeadROIHeads(StandardROIHeads):
    """StandardROIHeads with :class:`DoubleBoxHead` as its box head."""

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        ret = super()._init_box_head(cfg, input_shape)
        if not isinstance(ret["box_head"], DoubleBoxHead):
            raise ValueError(
                "MODEL.ROI_HEADS.NAME DoubleHeadROIHeads needs MODEL.ROI_BOX_HEAD.NAME "
                f"DoubleBoxHead, got {cfg.MODEL.ROI_BOX_HEAD.NAME}."
            )
        scale = cfg.MODEL.DOUBLE_HEAD.REGRESSION_SCALE
        ret["box_pooler"] = TwoExtentPooler(ret["box_pooler"], scale)
        ret["box_predictor"] = DoubleHeadOutputLayers(cfg, ret["box_head"].output_shape)
        return ret

    def forward(
        self,
        images: ImageList,
        features: dict[str, torch.Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, torch.Tensor]]:
        """Arguments and result as in ``StandardROIHeads``."""
        strides = [round(1 / x.spatial_scale) for x in self.box_pooler.pooler.level_poolers]
        ended = {
            name: end_at_images(features[name], images.image_sizes, stride)
            for name, stride in zip(self.box_in_features, strides, strict=True)
        }
        return super().forward(images, {**features, **ended}, proposals, targets)


def end_at_images(
    maps: torch.Tensor, image_sizes: Sequence[tuple[int, int]], stride: int
) -> torch.Tensor:
    """End maps where their images end: the last row and column once more, then zeros.

    The larger boxes reach beyond their image, where the other images of a batch decide on what maps
    have. Unlike the paper, whose code base pools there, an image has the same features alone and in
    a batch: those of RoIAlign, which repeats the last cell of a map and has zeros behind it, but
    for a slope of one cell between the two.

    Args:
        maps: (N, C, Hi, Wi).
        image_sizes: (height, width) of the N images, pixels of the network input.
        stride: pixels per cell.

    Returns:
        Tensor: (N, C, Hi + 2, Wi + 2).
    """
    maps = extend_edges(F.pad(maps, (0, 2, 0, 2)), image_sizes, stride)
    sizes = stack_image_sizes(image_sizes, maps.device)
    return maps * valid_cells(sizes + stride, maps.shape[-2:], stride, maps.dtype)


def _linear(inputs: int, outputs: int, std: float) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)
    return layer
