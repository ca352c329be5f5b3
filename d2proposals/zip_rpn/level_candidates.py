"""From the predictions of ZIP's levels to one list of boxes per image, before the second NMS.

Source: H. Li, Y. Liu, W. Ouyang, X. Wang, "Zoom Out-and-In Network with Map Attention Decision for
Region Proposal and Object Detection", IJCV 2019 (arXiv 1709.04347), Sec. 3.4.

Shape shorthand in this module:

    N: number of images in the batch
    L: number of levels
    Ri: anchors of level i, of all cells
    K: number of classes, 2 or (with the gray class) 3
    T: number of boxes of an image, of all levels
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from detectron2.layers import batched_nms
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes

from ..proposals.candidates import at_most, clip_candidates
from .gray_class_sampling import POSITIVE


class LevelCandidates(NamedTuple):
    """Boxes of one image, of all levels.

    Attributes:
        boxes: (T, 4) XYXY.
        scores: (T,) probabilities.
        levels: (T,) int64, 0 for the level of the highest resolution.
    """

    boxes: torch.Tensor
    scores: torch.Tensor
    levels: torch.Tensor

    def biased_scores(self, level_bias: Sequence[float]) -> torch.Tensor:
        """(T,) scores that are comparable between levels: each has its level's bias added.

        Unlike the paper, which adds it to "the raw scores", to the probabilities: they lie within
        the same bounds on all levels.
        """
        return self.scores + self.scores.new_tensor(level_bias)[self.levels]


def best_of_levels(
    anchors: Sequence[Boxes],
    is_on_image: Sequence[torch.Tensor],
    pred_class_logits: Sequence[torch.Tensor],
    pred_anchor_deltas: Sequence[torch.Tensor],
    box2box_transform: Box2BoxTransform,
    topk: int,
    gray_in_score: bool = True,
) -> list[LevelCandidates]:
    """The best boxes of each level, decoded; those of the padding have the score -1.

    Unlike the paper, which names only the 2,000 boxes that the NMS keeps, a limited number enters
    it.

    Args:
        anchors: of each level, Ri boxes.
        is_on_image: of each level, (N, Ri) bool, False for anchors of the padding.
        pred_class_logits: of each level, (N, Ri, K).
        pred_anchor_deltas: of each level, (N, Ri, 4).
        box2box_transform: encoding of boxes relative to anchors.
        topk: how many boxes of a level.
        gray_in_score: whether the probability of an object is that of three classes, so that what
            looks gray scores low; False: that of an object against background.

    Returns:
        Of each image, T = sum over levels of min(topk, Ri) boxes, which are not clipped.
    """
    boxes, scores, levels = [], [], []
    for level, (anchors_i, is_on_image_i, logits_i, deltas_i) in enumerate(
        zip(anchors, is_on_image, pred_class_logits, pred_anchor_deltas, strict=True)
    ):
        # The gray class only keeps positives and negatives apart; it is no object.
        scored = logits_i if gray_in_score else logits_i[..., : POSITIVE + 1]
        probability = scored.float().softmax(dim=-1)[..., POSITIVE]  # (N, Ri)
        # Best first, decoded afterwards: most boxes are never looked at.
        scores_i, index = probability.masked_fill(~is_on_image_i, -1.0).topk(
            at_most(probability.shape[1], topk), dim=1
        )
        deltas_i = deltas_i.gather(1, index[..., None].expand(-1, -1, 4))
        boxes_i = box2box_transform.apply_deltas(
            deltas_i.flatten(0, 1).float(), anchors_i.tensor[index.flatten()]
        )
        boxes.append(boxes_i.view(*index.shape, 4))
        scores.append(scores_i)
        levels.append(torch.full_like(index[0], level))
    levels = torch.cat(levels)
    return [
        LevelCandidates(boxes_n, scores_n, levels)
        for boxes_n, scores_n in zip(torch.cat(boxes, 1), torch.cat(scores, 1), strict=True)
    ]


@dataclass(frozen=True)
class LevelSuppression:
    """The initial NMS: each level by itself, so many boxes of each.

    Attributes:
        num_levels: L.
        nms_thresh: IoU above which the worse box goes.
        topk: boxes of a level that stay.
        min_box_size: boxes with a side of at most this are dropped, in pixels.
    """

    num_levels: int
    nms_thresh: float = 0.5
    topk: int = 2000
    min_box_size: float = 0.0

    def __call__(self, candidates: LevelCandidates, image_size: tuple[int, int]) -> LevelCandidates:
        """Clip the boxes of one image to (height, width), drop empty ones, suppress; best first."""
        boxes, index = clip_candidates(
            candidates.boxes, candidates.scores, image_size, self.min_box_size
        )
        scores, levels = candidates.scores[index], candidates.levels[index]
        keep = batched_nms(boxes, scores, levels, self.nms_thresh)
        # Best first over all levels: a box's place on its own level is a cumulative count.
        on_level = F.one_hot(levels[keep], self.num_levels)
        place = on_level.cumsum(dim=0).gather(1, levels[keep, None])[:, 0]
        keep = keep[place <= self.topk]
        return LevelCandidates(boxes[keep], scores[keep], levels[keep])
