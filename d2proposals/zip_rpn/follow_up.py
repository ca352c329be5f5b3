"""The follow-up network of ZIP's detector: RoI pooling by level, then shared residual blocks.

Source: H. Li, Y. Liu, W. Ouyang, X. Wang, "Zoom Out-and-In Network with Map Attention Decision for
Region Proposal and Object Detection", IJCV 2019 (arXiv 1709.04347), Sec. 4, Fig. 6.

Shape shorthand in this module:

    N: number of images in the batch
    R: number of RoIs, of all images
    P: side of the pooled maps, in bins
    Ci, Hi, Wi: channels and size of the feature map of level i
    C: channels after the convolution of each level

Naming convention:

    level: 0 for the map of the highest resolution, which has the smallest RoIs.
    side: square root of an RoI's area, in pixels of the network input.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling.backbone.resnet import BottleneckBlock, ResNet
from detectron2.modeling.poolers import ROIPooler, convert_boxes_to_pooler_format
from detectron2.structures import Boxes
from fvcore.nn import weight_init
from torch import nn

from ..backbones.masked_norm import NORMS, build_norm


class LevelPooler(ROIPooler):
    """Pools each RoI from the map of its size; a 1x1 convolution of the level follows.

    The levels have maps of different channels, which Detectron2's pooler does not take. "We have an
    additional convolution layer for each level, which transfers the RoI-pooled feature maps to have
    the same number of channels after the RoI-pooling" (Sec. 4).

    Unlike the paper, whose RoI pooling rounds boxes to cells, RoIAlign by default: rounded boxes
    reach past the image into the padding of a batch ("ROIPool" is the paper's).
    """

    def __init__(
        self,
        *,
        in_channels: Sequence[int],
        strides: Sequence[int],
        out_channels: int = 1024,
        level_sides: Sequence[float] = (45.25, 181.02),
        output_size: int = 7,
        sampling_ratio: int = 0,
        pooler_type: str = "ROIAlignV2",
    ):
        """
        Args:
            in_channels: of the map of each level.
            strides: pixels per cell of each level; powers of 2, each twice the last.
            out_channels: C.
            level_sides: RoIs whose side is at least the i-th number are pooled from level i + 1 or
                above; ascending, one less than there are levels.
            output_size: P.
            sampling_ratio: as in ``ROIPooler``.
            pooler_type: as in ``ROIPooler``.

        Raises:
            ValueError: ``level_sides`` or ``strides`` do not fit the levels.
        """
        strides, level_sides = list(strides), [float(side) for side in level_sides]
        if strides != [strides[0] * 2**i for i in range(len(strides))]:
            raise ValueError(
                "MODEL.ROI_HEADS.IN_FEATURES must name maps that are each half the size of the one "
                f"before; theirs have strides {strides}"
            )
        if len(level_sides) != len(strides) - 1 or level_sides != sorted(level_sides):
            raise ValueError(
                "MODEL.ZIP_DETECTOR.LEVEL_SIDES must be ascending, with one number less than "
                f"MODEL.ROI_HEADS.IN_FEATURES has maps ({len(strides)}), got {level_sides}"
            )
        super().__init__(output_size, [1.0 / s for s in strides], sampling_ratio, pooler_type)
        self.strides = strides
        self.level_sides = level_sides
        # Rectified, as whatever the first of ResNet's blocks reads.
        self.projections = nn.ModuleList(
            Conv2d(channels, out_channels, kernel_size=1, activation=F.relu)
            for channels in in_channels
        )
        for projection in self.projections:
            weight_init.c2_msra_fill(projection)

    def assign_levels(self, boxes: torch.Tensor) -> torch.Tensor:
        """Level of each RoI (R,) int64, by the side of its box (R, 4) XYXY.

        Unlike the paper, whose Fig. 6 hands each level its own proposals: they are merged before,
        and objects, which the training adds to them, come from no level.
        """
        sides = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
        levels = torch.zeros_like(sides, dtype=torch.int64)
        for bound in self.level_sides:
            levels += sides >= bound
        return levels

    def forward(self, x: list[torch.Tensor], box_lists: list[Boxes]) -> torch.Tensor:
        """
        Args:
            x: map of each level, (N, Ci, Hi, Wi).
            box_lists: RoIs of each image, XYXY, pixels of the network input.

        Returns:
            Tensor: (R, C, P, P), not negative, in the order of the RoIs.
        """
        boxes = convert_boxes_to_pooler_format(box_lists)  # (R, 5): image, XYXY
        levels = self.assign_levels(boxes[:, 1:])
        indices, pooled = [], []
        for i, (x_i, pooler, projection) in enumerate(
            zip(x, self.level_poolers, self.projections, strict=True)
        ):
            indices.append((levels == i).nonzero()[:, 0])
            # Single precision: half would move the boxes, whose coordinates it rounds.
            pooled_i = pooler(x_i.float(), boxes[indices[-1]]).to(x_i.dtype)
            # A level without RoIs is convolved too: its weights get a gradient, zero, without
            # which training on several devices stops.
            pooled.append(projection(pooled_i))
        return torch.cat(pooled)[torch.cat(indices).argsort()]


class FollowUpBlocks(nn.Module):
    """ResNet-101's res4b15 to res4b20 and res5a to res5c on each RoI, shared by all levels.

    Sec. 4: "9 blocks, corresponding to the higher modules in ResNet-101", then Fig. 6: a global
    average. Unlike the paper, whose Fig. 6 writes 1024 x 1 x 1 behind them, res5c has 2,048
    channels here, as in ResNet-101.
    """

    def __init__(
        self,
        *,
        channels: int = 1024,
        num_res4_blocks: int = 6,
        num_res5_blocks: int = 3,
        res5_stride: int = 2,
        norm: str = "FrozenBN",
        stride_in_1x1: bool = False,
        all_blocks: bool = False,
    ):
        """
        Args:
            channels: C, of the input and of the blocks of res4; those of res5 have twice as many.
            num_res4_blocks: how many blocks of res4.
            num_res5_blocks: how many blocks of res5.
            res5_stride: of the first block of res5.
            norm: "FrozenBN", "BN", "SyncBN", "GN" or "" for none.
            stride_in_1x1: whether a block's stride is in its first convolution (MSRA's weights) or
                in the 3x3 (torchvision's).
            all_blocks: in evaluation, return the features of all blocks, not of the last alone.

        Raises:
            ValueError: there are no blocks, ``norm`` is unknown, or ``channels`` is no positive
                multiple of 4.
        """
        super().__init__()
        if min(num_res4_blocks, num_res5_blocks) < 0 or num_res4_blocks + num_res5_blocks == 0:
            raise ValueError(
                "MODEL.ZIP_DETECTOR.NUM_RES4_BLOCKS and NUM_RES5_BLOCKS must not be negative, nor "
                f"both 0; got {num_res4_blocks} and {num_res5_blocks}"
            )
        if norm not in NORMS:
            raise ValueError(f"MODEL.ZIP_DETECTOR.NORM must be one of {NORMS}, got '{norm}'")
        if channels <= 0 or channels % 4 != 0:
            raise ValueError(
                f"MODEL.ZIP_DETECTOR.CHANNELS must be a positive multiple of 4, got {channels}"
            )
        self.all_blocks = all_blocks

        def make_stage(num_blocks: int, in_channels: int, width: int, stride: int) -> nn.Sequential:
            blocks = ResNet.make_stage(
                BottleneckBlock,
                num_blocks,
                in_channels=in_channels,
                out_channels=width,
                bottleneck_channels=width // 4,
                stride_per_block=[stride, *[1] * (num_blocks - 1)][:num_blocks],
                norm=lambda channels: build_norm(norm, channels),
                stride_in_1x1=stride_in_1x1,
            )
            return nn.Sequential(*blocks)

        self.res4 = make_stage(num_res4_blocks, channels, channels, 1)
        self.res5 = make_stage(num_res5_blocks, channels, 2 * channels, res5_stride)
        # Channels of each block's output.
        self.block_channels = [channels] * num_res4_blocks + [2 * channels] * num_res5_blocks

    @property
    def output_shape(self) -> ShapeSpec:
        """Shape of the features of the last block."""
        return ShapeSpec(channels=self.block_channels[-1], height=1, width=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: (R, C, P, P).

        Returns:
            Tensor: (R, output_shape.channels), or :meth:`block_features` in evaluation with
            ``all_blocks``.
        """
        if self.all_blocks and not self.training:
            return self.block_features(x)
        return self.res5(self.res4(x)).mean(dim=(2, 3))

    def block_features(self, x: torch.Tensor) -> torch.Tensor:
        """Globally averaged outputs of all blocks, side by side, those of the last block last.

        Args:
            x: (R, C, P, P).

        Returns:
            Tensor: (R, sum of ``block_channels``); 12,288 for the paper's nine blocks.
        """
        means = []
        for block in (*self.res4, *self.res5):
            x = block(x)
            means.append(x.mean(dim=(2, 3)))
        return torch.cat(means, dim=1)
