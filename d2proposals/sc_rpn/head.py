"""The head of SC-RPN, shared by all feature maps.

Source: W. Zou, Z. Zhang, Y. Peng, C. Xiang, S. Tian and L. Zhang, "SC-RPN: A Strong Correlation
Learning Framework for Region Proposal", IEEE Transactions on Image Processing 30, 2021,
Sec. III and Fig. 1.

    feature map -> 3x3 conv -> init offset                                        (first stage)
    feature map -> 3x3 conv at the initial points -> cls map -> classification   (second stage)
                                                  -> reg map -> secondary offset
                                                             -> IoU mask

Shape shorthand in this module:

    N: number of images in the batch
    A: number of anchors per location
    D: numbers that a proposal's shape has (points: 18, box: 4)
    Hi, Wi: height and width of feature map i
    R: number of locations of one image, sum of Hi * Wi over the feature maps
    P: number of locations at which the second stage is computed
"""

import math

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec
from torch import nn

from ..proposals.sampled_convolution import conv3x3_at, pointwise_at
from .aligned_convolution import AlignedConv
from .point_representation import (
    BoxRepresentation,
    PointRepresentation,
    box_alignment_offset,
    build_representation,
    point_alignment_offset,
)
from .predictions import HeadPredictions, InitialPredictions, SampledPredictions

ALIGNMENTS = ("point", "box", "none")
IOU_MASK_FEATURES = ("reg", "cls", "fused")


class SCRPNHead(nn.Module):
    """Both stages of SC-RPN on one feature map after the other, with shared weights.

    The second stage is computed everywhere to propose, and at the samples alone to train.
    """

    @configurable
    def __init__(
        self,
        *,
        in_channels: int,
        channels: int,
        num_convs: int,
        representation: PointRepresentation | BoxRepresentation,
        num_stages: int,
        alignment: str,
        alignment_gradient: float,
        iou_mask_feature: str | None,
        sampler: str = "auto",
        prior_prob: float = 0.5,
    ):
        """
        Args:
            in_channels: channels of every feature map.
            channels: of each hidden map.
            num_convs: 3x3 convolutions before both stages. The paper shows none.
            representation: of the proposals.
            num_stages: 1: initial proposals are classified (RPN); 2: SC-RPN.
            alignment: where the second stage looks. "point": at the initial points; "box": evenly
                over the initial box; "none": at the 3x3 cells around the location.
            alignment_gradient: factor on the gradient from the second stage to the points.
            iou_mask_feature: map that predicts the IoU mask: "reg", "cls" or "fused" (their sum);
                None for no IoU mask.
            sampler: of the deformable convolution, see :class:`AlignedConv`.
            prior_prob: in (0, 1), probability of an object that the classification begins with.

        Raises:
            ValueError: unknown names, or settings that exclude each other.
        """
        super().__init__()
        self.representation = representation
        self.num_stages = num_stages
        self.alignment = alignment
        self.alignment_gradient = alignment_gradient
        self.iou_mask_feature = iou_mask_feature
        self._check_settings()
        if not 0 < prior_prob < 1:
            raise ValueError(f"MODEL.SCRPN.PRIOR_PROB must be between 0 and 1, got {prior_prob}")

        num_anchors = representation.num_anchors
        shape_channels = num_anchors * representation.shape_dim
        self.tower = nn.Sequential()
        for _ in range(num_convs):
            self.tower.append(_conv3x3(in_channels, channels))
            in_channels = channels
        self.init_conv = _conv3x3(in_channels, channels)
        self.init_offset = nn.Conv2d(channels, shape_channels, kernel_size=1)
        if num_stages == 2:
            # Classification and regression map in one, see AlignedConv.
            self.aligned_conv = AlignedConv(
                in_channels=in_channels, out_channels=2 * channels, sampler=sampler
            )
            self._cls_outputs, self._reg_outputs = slice(channels), slice(channels, None)
            self.secondary_offset = nn.Conv2d(channels, shape_channels, kernel_size=1)
        self.classification = nn.Conv2d(channels, num_anchors, kernel_size=1)
        if iou_mask_feature is not None:
            self.iou_mask = nn.Conv2d(channels, num_anchors, kernel_size=1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.constant_(layer.bias, 0)
        nn.init.constant_(self.classification.bias, math.log(prior_prob / (1 - prior_prob)))

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict:
        node = cfg.MODEL.SCRPN
        in_channels = {shape.channels for shape in input_shape}
        if len(in_channels) != 1:
            raise ValueError(
                "SC-RPN's head is shared: the feature maps of MODEL.SCRPN.IN_FEATURES must have "
                f"equal channels, got {[shape.channels for shape in input_shape]}"
            )
        return {
            "in_channels": in_channels.pop(),
            "channels": node.HEAD_CHANNELS,
            "num_convs": node.NUM_CONVS,
            "representation": build_representation(
                node.REPRESENTATION, node.ANCHOR_SIDE, node.ANCHOR_ASPECT_RATIOS, node.POINT_UNIT
            ),
            "num_stages": node.NUM_STAGES,
            "alignment": node.ALIGNMENT,
            "alignment_gradient": node.ALIGNMENT_GRADIENT,
            "iou_mask_feature": node.IOU_MASK.FEATURE if node.IOU_MASK.ENABLED else None,
            "sampler": node.DEFORM_SAMPLER,
            "prior_prob": node.PRIOR_PROB,
        }

    def forward(
        self, features: list[torch.Tensor], valid: list[torch.Tensor | None]
    ) -> HeadPredictions:
        """Both stages everywhere; see :meth:`predict_initial` for the arguments."""
        return self.predict_refined(self.predict_initial(features, valid))

    def predict_initial(
        self,
        features: list[torch.Tensor],
        valid: list[torch.Tensor | None],
        learns_everywhere: bool = True,
    ) -> InitialPredictions:
        """The first stage.

        Args:
            features: one (N, C, Hi, Wi) per feature map.
            valid: one (N, 1, Hi, Wi) per feature map, 1 on the cells inside the images, 0 in their
                padding, which has no effect on the predictions inside; None without padding.
            learns_everywhere: False, with two stages, for predictions without a gradient, until
                :meth:`learn_initial_at` says where they have one.
        """
        maps, shapes, logits = [], [], []
        for x, v in zip(features, valid, strict=True):
            # The convolutions look at their neighbours, the aligned one wherever the points are.
            x = x if v is None else x * v
            for conv in self.tower:
                x = conv(x) if v is None else conv(x) * v
            with torch.set_grad_enabled(learns_everywhere and torch.is_grad_enabled()):
                hidden = self.init_conv(x)
                prediction = self._channels_last(self.init_offset(hidden))  # (N, Hi, Wi, A, D)
                shapes.append(self.representation.decode_init(prediction))
            maps.append(x)
            if self.num_stages == 1:
                logits.append(self._channels_last(self.classification(hidden)).flatten(1))
        return InitialPredictions(maps, shapes, logits)

    def learn_initial_at(
        self, initial: InitialPredictions, is_needed: torch.Tensor
    ) -> InitialPredictions:
        """The same predictions, with a gradient at the locations that some samples belong to.

        Args:
            initial: without a gradient.
            is_needed: (N, R * A) bool samples.
        """
        shapes = []
        by_level = self._needed_positions(initial, is_needed)
        for x, shape, positions in zip(initial.maps, initial.shapes, by_level, strict=True):
            hidden = self.init_conv.activation(conv3x3_at(self.init_conv, x, positions))
            prediction = self._pointwise(self.init_offset, hidden)  # (P, A, D)
            values = self.representation.decode_init(prediction[:, None, None])[:, 0, 0]
            shapes.append(
                shape.flatten(0, 2).index_put((positions,), values).unflatten(0, shape.shape[:3])
            )
        return InitialPredictions(initial.maps, shapes, initial.class_logits)

    def predict_refined(self, initial: InitialPredictions) -> HeadPredictions:
        """The second stage everywhere; with one stage, that stage."""
        if self.num_stages == 1:
            logits = torch.cat(initial.class_logits, dim=1)
            return HeadPredictions(initial.init_shape, logits, None, None)
        by_rows = self.alignment != "none" and self.aligned_conv.uses_gather()
        refine = self._refine_rows if by_rows else self._refine_maps
        per_level = [refine(x, s) for x, s in zip(initial.maps, initial.shapes, strict=True)]
        return HeadPredictions(initial.init_shape, *_concatenate(per_level, dim=1))

    def predict_refined_at(
        self, initial: InitialPredictions, is_needed: torch.Tensor
    ) -> SampledPredictions:
        """The second stage at the locations that some samples belong to.

        Losses read a few hundred samples of an image that has a hundred times as many. Values and
        gradients are those of :meth:`predict_refined` there.

        Args:
            initial: of both stages' maps.
            is_needed: (N, R * A) bool samples. The other anchors of their locations come along.
        """
        num_anchors = self.representation.num_anchors
        is_needed = is_needed.unflatten(1, (-1, num_anchors)).any(dim=2)  # (N, R)
        locations = is_needed.flatten().nonzero()[:, 0]  # (P,)
        shapes = initial.init_shape.flatten(0, 1).unflatten(0, (-1, num_anchors))  # (N*R, A, D)
        fields = self._predict_rows(self._aligned_rows(initial.maps, shapes, locations))
        anchors = torch.arange(num_anchors, device=is_needed.device)
        index = (locations[:, None] * num_anchors + anchors).flatten()
        return SampledPredictions(initial.init_shape, index, *fields)

    def _needed_positions(
        self, initial: InitialPredictions, is_needed: torch.Tensor
    ) -> list[torch.Tensor]:
        """The locations that some samples belong to, by feature map.

        Args:
            initial: of all maps.
            is_needed: (N, R * A) bool samples.

        Returns:
            of each map (P,) int64 in [0, N * Hi * Wi).
        """
        is_needed = is_needed.unflatten(1, (-1, self.representation.num_anchors)).any(dim=2)
        by_level = is_needed.split([x.shape[-2] * x.shape[-1] for x in initial.maps], dim=1)
        return [cells.flatten().nonzero()[:, 0] for cells in by_level]

    def predict_classes(self, initial: InitialPredictions) -> HeadPredictions:
        """The second stage everywhere without its regression map: no secondary offsets, and an IoU
        mask only if the classification map predicts it."""
        per_level = []
        for x, init_shape in zip(initial.maps, initial.shapes, strict=True):
            shapes = init_shape.flatten(0, 2)
            cls_map = self._aligned_rows([x], shapes, outputs=self._cls_outputs)
            iou_mask = None
            if self.iou_mask_feature == "cls":
                iou_mask = self._pointwise(self.iou_mask, cls_map).view(len(x), -1)
            logits = self._pointwise(self.classification, cls_map).view(len(x), -1)
            per_level.append((logits, None, iou_mask))
        return HeadPredictions(initial.init_shape, *_concatenate(per_level, dim=1))

    def refine_shapes_at(
        self, initial: InitialPredictions, level: int, positions: torch.Tensor
    ) -> torch.Tensor:
        """Refined shapes at some locations of one feature map.

        Args:
            initial: of the first stage.
            level: index of the feature map.
            positions: (P,) int64 in [0, N * Hi * Wi), the cells of one image after the other.

        Returns:
            Tensor: (P * A, D) in cells around the location.
        """
        shapes = initial.shapes[level].flatten(0, 2)
        reg_map = self._aligned_rows([initial.maps[level]], shapes, positions, self._reg_outputs)
        secondary = self._pointwise(self.secondary_offset, reg_map).flatten(0, 1)
        init_shape = shapes[positions].flatten(0, 1)
        return self.representation.decode_refined(init_shape, secondary)

    def _refine_maps(
        self, x: torch.Tensor, init_shape: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        """The fields of HeadPredictions after the first, for one feature map, by convolutions."""
        aligned = self.aligned_conv(x, self._alignment_offset(init_shape)).relu_()
        # Contiguous: convolutions of slices take a slow path on the CPU.
        cls_map, reg_map = (m.contiguous() for m in aligned.chunk(2, dim=1))
        logits = self._channels_last(self.classification(cls_map)).flatten(1)
        secondary = self._channels_last(self.secondary_offset(reg_map)).flatten(1, 3)
        iou_mask = None
        if self.iou_mask_feature is not None:
            mask_map = self._mask_map(cls_map, reg_map)
            iou_mask = self._channels_last(self.iou_mask(mask_map)).flatten(1)
        return logits, secondary, iou_mask

    def _refine_rows(
        self, x: torch.Tensor, init_shape: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        """:meth:`_refine_maps` by products of rows, which spare copies of the maps."""
        fields = self._predict_rows(self._aligned_rows([x], init_shape.flatten(0, 2)))
        return tuple(None if y is None else y.unflatten(0, (len(x), -1)) for y in fields)

    def _aligned_rows(
        self,
        maps: list[torch.Tensor],
        shapes: torch.Tensor,
        positions: torch.Tensor | None = None,
        outputs: slice = slice(None),
    ) -> torch.Tensor:
        """Both aligned maps, or some of their channels, as rows.

        Args:
            maps: one (N, C, Hi, Wi) of the second stage per feature map.
            shapes: (N * R, A, D) initial ones, of these maps' locations.
            positions: (P,) int64 in [0, N * R); all by default.
            outputs: channels that are wanted.

        Returns:
            Tensor: (P, channels).
        """
        if positions is None:
            positions = torch.arange(len(shapes), device=shapes.device)
        else:
            shapes = shapes[positions]
        offset = self._alignment_offset(shapes[:, None, None])  # each a map of one cell
        offset = None if offset is None else offset.flatten(1)  # (P, 18)
        return self.aligned_conv.forward_at(maps, offset, positions, outputs).relu_()

    def _predict_rows(self, aligned: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Class logits (P * A,), secondary (P * A, D) and IoU mask (P * A,) of both maps' rows."""
        cls_map, reg_map = aligned.chunk(2, dim=1)  # (P, C)
        logits = self._pointwise(self.classification, cls_map).flatten()
        secondary = self._pointwise(self.secondary_offset, reg_map).flatten(0, 1)
        iou_mask = None
        if self.iou_mask_feature is not None:
            mask_map = self._mask_map(cls_map, reg_map)
            iou_mask = self._pointwise(self.iou_mask, mask_map).flatten()
        return logits, secondary, iou_mask

    def _mask_map(self, cls_map: torch.Tensor, reg_map: torch.Tensor) -> torch.Tensor:
        """The map that predicts the IoU mask."""
        if self.iou_mask_feature == "fused":
            return cls_map + reg_map
        return reg_map if self.iou_mask_feature == "reg" else cls_map

    def _pointwise(self, conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        """A 1x1 convolution of (P, C) -> (P, A, D), float32 for decoding."""
        outputs = pointwise_at(conv, x).float()
        return outputs.unflatten(1, (self.representation.num_anchors, -1))

    def _alignment_offset(self, init_shape: torch.Tensor) -> torch.Tensor | None:
        """Offsets (N, 18, Hi, Wi) from initial shapes (N, Hi, Wi, A, D); None if there are none."""
        if self.alignment == "none":
            return None
        if self.alignment == "point":
            return point_alignment_offset(init_shape[..., 0, :], self.alignment_gradient)
        return box_alignment_offset(self.representation.to_boxes(init_shape[..., 0, :]))

    def _channels_last(self, x: torch.Tensor) -> torch.Tensor:
        """(N, A * D, Hi, Wi) -> (N, Hi, Wi, A, D), float32 for decoding."""
        return x.float().permute(0, 2, 3, 1).unflatten(-1, (self.representation.num_anchors, -1))

    def _check_settings(self) -> None:
        """Raise ValueError for names that do not exist and settings that exclude each other."""
        if self.num_stages not in (1, 2):
            raise ValueError(f"MODEL.SCRPN.NUM_STAGES must be 1 or 2, got {self.num_stages}")
        if self.alignment not in ALIGNMENTS:
            raise ValueError(
                f"unknown MODEL.SCRPN.ALIGNMENT {self.alignment!r}, choose one of {ALIGNMENTS}"
            )
        if self.iou_mask_feature not in (None, *IOU_MASK_FEATURES):
            raise ValueError(
                f"unknown MODEL.SCRPN.IOU_MASK.FEATURE {self.iou_mask_feature!r}, "
                f"choose one of {IOU_MASK_FEATURES}"
            )
        if self.num_stages == 1 and (self.alignment != "none" or self.iou_mask_feature is not None):
            raise ValueError(
                "MODEL.SCRPN.NUM_STAGES 1 has nothing to align and no IoU mask: set ALIGNMENT to "
                "'none' and IOU_MASK.ENABLED to False"
            )
        if self.alignment == "point" and isinstance(self.representation, BoxRepresentation):
            raise ValueError(
                "MODEL.SCRPN.ALIGNMENT 'point' needs REPRESENTATION 'points'; choose ALIGNMENT "
                "'box' or 'none' for boxes"
            )
        if self.alignment != "none" and self.representation.num_anchors != 1:
            raise ValueError(
                "MODEL.SCRPN.ALIGNMENT follows one proposal per location: use one of "
                "ANCHOR_ASPECT_RATIOS, or ALIGNMENT 'none'"
            )


def _conv3x3(in_channels: int, out_channels: int) -> Conv2d:
    return Conv2d(in_channels, out_channels, kernel_size=3, padding=1, activation=nn.ReLU())


def _concatenate(
    per_level: list[tuple[torch.Tensor | None, ...]], dim: int
) -> list[torch.Tensor | None]:
    """Join each field of all feature maps; None stays None."""
    return [
        None if parts[0] is None else torch.cat(parts, dim=dim)
        for parts in zip(*per_level, strict=True)
    ]
