"""ZIP as a detector: RoIs pooled from the attended maps, the follow-up network, classes and boxes.

Source: H. Li, Y. Liu, W. Ouyang, X. Wang, "Zoom Out-and-In Network with Map Attention Decision for
Region Proposal and Object Detection", IJCV 2019 (arXiv 1709.04347), Sec. 4, Fig. 6.

Sampling, losses and the suppression of duplicates are Detectron2's.

Shape shorthand in this module:

    N: number of images in the batch
    R: number of RoIs, of all images
    K: number of classes
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.roi_heads import FastRCNNOutputLayers, StandardROIHeads
from detectron2.structures import ImageList, Instances

from ..proposals.candidates import select_input_shapes
from ..proposals.image_extent import extend_edges
from .boosting import BoostedTrees, load_boosted_trees
from .follow_up import FollowUpBlocks, LevelPooler


@ROI_HEADS_REGISTRY.register()
class ZIPHeads(StandardROIHeads):
    """Detectron2's heads for boxes, with ZIP's pooling and follow-up network."""

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        """The constructor's arguments about boxes.

        Raises:
            ValueError: names the key that does not fit.
        """
        if cfg.MODEL.MASK_ON or cfg.MODEL.KEYPOINT_ON:
            raise ValueError(
                "ZIPHeads finds boxes only: set MODEL.MASK_ON and MODEL.KEYPOINT_ON to False"
            )
        node, roi_node = cfg.MODEL.ZIP_DETECTOR, cfg.MODEL.ROI_BOX_HEAD
        in_features = list(cfg.MODEL.ROI_HEADS.IN_FEATURES)
        shapes = select_input_shapes(
            "MODEL.ROI_HEADS.IN_FEATURES", in_features, input_shape, cfg.MODEL.BACKBONE.NAME
        )
        box_pooler = LevelPooler(
            in_channels=[shape.channels for shape in shapes],
            strides=[shape.stride for shape in shapes],
            out_channels=node.CHANNELS,
            level_sides=node.LEVEL_SIDES,
            output_size=roi_node.POOLER_RESOLUTION,
            sampling_ratio=roi_node.POOLER_SAMPLING_RATIO,
            pooler_type=roi_node.POOLER_TYPE,
        )
        box_head = FollowUpBlocks(
            channels=node.CHANNELS,
            num_res4_blocks=node.NUM_RES4_BLOCKS,
            num_res5_blocks=node.NUM_RES5_BLOCKS,
            res5_stride=node.RES5_STRIDE,
            norm=node.NORM,
            stride_in_1x1=node.STRIDE_IN_1X1,
            all_blocks=node.BOOSTING_FILE != "",
        )
        if node.BOOSTING_FILE == "":
            box_predictor = FastRCNNOutputLayers(cfg, box_head.output_shape)
        else:
            boosting = _load_fitting_trees(cfg, sum(box_head.block_channels))
            box_predictor = BoostedOutputLayers(cfg, box_head.output_shape, boosting=boosting)
        return {
            "box_in_features": in_features,
            "box_pooler": box_pooler,
            "box_head": box_head,
            "box_predictor": box_predictor,
        }

    def forward(
        self,
        images: ImageList,
        features: dict[str, torch.Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, torch.Tensor]]:
        """Arguments and result as in ``StandardROIHeads``."""
        return super().forward(
            images, self.pooled_maps(features, images.image_sizes), proposals, targets
        )

    def pooled_maps(
        self, features: dict[str, torch.Tensor], image_sizes: Sequence[tuple[int, int]]
    ) -> dict[str, torch.Tensor]:
        """The maps that RoIs are pooled from, ended at their images' borders.

        Args:
            features: of the backbone, by name.
            image_sizes: (height, width) of the N images, pixels of the network input.
        """
        names, strides = self.box_in_features, self.box_pooler.strides
        return {
            name: extend_edges(features[name], image_sizes, stride)
            for name, stride in zip(names, strides, strict=True)
        }


class BoostedOutputLayers(FastRCNNOutputLayers):
    """Detectron2's predictions, whose scores come from boosted trees in evaluation.

    "We modify the detection confidence score from the neural network output p to the classifier
    decision of the boosting algorithm" (Sec. 4). Training is that of the network alone.

    A score is a share of the trees' votes, no probability: among many classes the right one often
    has a few hundredths. MODEL.ROI_HEADS.SCORE_THRESH_TEST, a bound on probabilities, is therefore
    not read; TEST.DETECTIONS_PER_IMAGE bounds the detections.
    """

    stays_in_python = "a trace would freeze how many proposals an image has (BOOSTING_FILE)."

    @configurable
    def __init__(self, input_shape: ShapeSpec, *, boosting: BoostedTrees, **kwargs):
        """
        Args:
            input_shape: of the features of the last block.
            boosting: the fitted classifier, on the features of all blocks.
            kwargs: as for ``FastRCNNOutputLayers``.
        """
        super().__init__(input_shape, **kwargs)
        self.boosting = boosting

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec, *, boosting: BoostedTrees) -> dict:
        return {
            **super().from_config(cfg, input_shape),
            "test_score_thresh": 0.0,
            "boosting": boosting,
        }

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            x: (R, channels of the last block) in training, (R, channels of all blocks) else.

        Returns:
            (R, K + 1) class logits in training, else confidences in [0, 1] of the classes and, last
            of all, of background; and the offsets of the boxes.
        """
        if self.training:
            return super().forward(x)
        return self.boosting(x), self.bbox_pred(x[:, -self.bbox_pred.in_features :])

    def predict_probs(
        self, predictions: tuple[torch.Tensor, torch.Tensor], proposals: list[Instances]
    ) -> list[torch.Tensor]:
        """Confidences of the RoIs of each image, (Ri, K + 1)."""
        if self.training:
            return super().predict_probs(predictions, proposals)
        return list(predictions[0].split([len(p) for p in proposals]))


def _load_fitting_trees(cfg: CfgNode, num_features: int) -> BoostedTrees:
    """The trees of ``BOOSTING_FILE``; ValueError unless they are made for this detector."""
    path, num_classes = cfg.MODEL.ZIP_DETECTOR.BOOSTING_FILE, cfg.MODEL.ROI_HEADS.NUM_CLASSES
    boosting = load_boosted_trees(path)
    if (boosting.num_features, boosting.num_classes) != (num_features, num_classes):
        raise ValueError(
            f"MODEL.ZIP_DETECTOR.BOOSTING_FILE {path} is made for {boosting.num_features} features "
            f"and {boosting.num_classes} classes; this detector has {num_features} features of its "
            f"follow-up blocks and {num_classes} classes. Fit it again: tools/boost_detector.py"
        )
    return boosting
