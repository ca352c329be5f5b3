"""What SC-RPN's head predicts: the first stage everywhere, the second everywhere or at samples.

Shape shorthand in this module:

    N: number of images in the batch
    A: number of anchors per location
    D: numbers that a proposal's shape has (points: 18, box: 4)
    Hi, Wi: height and width of feature map i
    R: number of locations of one image, sum of Hi * Wi over the feature maps
    S: number of samples at which the second stage was computed
"""

from dataclasses import dataclass

import torch


@dataclass
class InitialPredictions:
    """The first stage of a batch, and what the second one looks at.

    Attributes:
        maps: one (N, C, Hi, Wi) per feature map, zero in the padding of the batch.
        shapes: one (N, Hi, Wi, A, D) float32 per feature map: initial points or boxes, in cells
            around the location.
        class_logits: one (N, Hi * Wi * A) per feature map with one stage, otherwise empty.
    """

    maps: list[torch.Tensor]
    shapes: list[torch.Tensor]
    class_logits: list[torch.Tensor]

    def __post_init__(self):
        self.init_shape = torch.cat([shape.flatten(1, 3) for shape in self.shapes], dim=1)


@dataclass
class SampledPredictions:
    """Predictions of both stages, those of the last one at S samples alone, float32.

    Attributes:
        init_shape: (N, R * A, D) initial points or boxes of all samples, in cells around the
            location.
        index: (S,) int64, the samples in the flattened (N, R * A), each once.
        class_logits: (S,) logits of "object".
        secondary: (S, D) secondary offsets or deltas; None with one stage.
        iou_mask: (S,) output of the IoU mask's convolution, before its sigmoids; None without an
            IoU mask.
    """

    init_shape: torch.Tensor
    index: torch.Tensor
    class_logits: torch.Tensor
    secondary: torch.Tensor | None
    iou_mask: torch.Tensor | None


@dataclass
class HeadPredictions:
    """Predictions for all locations of a batch, feature maps concatenated, float32.

    Attributes:
        init_shape: (N, R * A, D) initial points or boxes, in cells around the location.
        class_logits: (N, R * A) logits of "object".
        secondary: (N, R * A, D) secondary offsets or deltas; None with one stage.
        iou_mask: (N, R * A) output of the IoU mask's convolution, before its sigmoids; None
            without an IoU mask.
    """

    init_shape: torch.Tensor
    class_logits: torch.Tensor
    secondary: torch.Tensor | None
    iou_mask: torch.Tensor | None

    def at(self, is_needed: torch.Tensor) -> SampledPredictions:
        """The same at some samples: ``is_needed`` is (N, R * A) bool."""
        index = is_needed.flatten().nonzero()[:, 0]
        return SampledPredictions(
            self.init_shape,
            index,
            *(
                None if x is None else x.flatten(0, 1)[index]
                for x in (self.class_logits, self.secondary, self.iou_mask)
            ),
        )
