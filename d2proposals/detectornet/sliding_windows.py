"""The paper's baseline: all windows of a dense grid, for a classifier to tell what is in them.

Source: C. Szegedy, A. Toshev and D. Erhan, "Deep Neural Networks for Object Detection", NIPS 2013,
Sec. 7.

Shape shorthand in this module:

    R: number of windows of one image
    Y, X: number of positions of a shape along the height and along the width
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY
from detectron2.structures import ImageList, Instances

from ..proposals.candidates import make_proposals
from ..proposals.proposal_generator import ProposalGenerator
from .box_search import box_shapes, check_shapes, num_positions


@dataclass(frozen=True)
class SlidingGrid:
    """The windows of an image: sizes times aspect ratios, at positions a stride apart.

    Unlike the paper, which gives eight aspect ratios and ten scales by their number alone: the
    scales are evenly spaced, with which an image of 500x375 has 156,000 windows ("approximately
    150,000"; with a constant factor from each to the next they would be half as many again), and a
    size is a mean dimension, as in the search of Sec. 5.2.

    Attributes:
        mean_dimensions: (height + width) / 2, relative to the image's; 1 is the whole image.
        aspect_ratios: width / height; sides longer than the image's become the image's, see
            :func:`~.box_search.box_shapes`.
        stride: distance between positions, in pixels.
    """

    mean_dimensions: tuple[float, ...]
    aspect_ratios: tuple[float, ...]
    stride: float = 5.0

    def __post_init__(self) -> None:
        key = "MODEL.DETECTORNET.SLIDING_WINDOWS"
        check_shapes(key, self.mean_dimensions, self.aspect_ratios, self.stride)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> SlidingGrid:
        """As MODEL.DETECTORNET.SLIDING_WINDOWS says."""
        node = cfg.MODEL.DETECTORNET.SLIDING_WINDOWS
        return cls(tuple(node.MEAN_DIMENSIONS), tuple(node.ASPECT_RATIOS), node.STRIDE)

    def windows(
        self, image_size: tuple[int, int], device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """The windows of an image, (R, 4) XYXY float32 in pixels, the largest size first.

        Args:
            image_size: (H, W) in pixels.
            device: of the result.
        """
        sizes = sorted(self.mean_dimensions, reverse=True)
        return torch.cat(
            [
                self._positions(image_size, shape, device)
                for shape in box_shapes(image_size, sizes, self.aspect_ratios)
            ]
        )

    def number(self, image_size: tuple[int, int]) -> int:
        """R, without making the windows."""
        return sum(
            math.prod(
                num_positions(*sides, self.stride) for sides in zip(image_size, shape, strict=True)
            )
            for shape in box_shapes(image_size, self.mean_dimensions, self.aspect_ratios)
        )

    def _positions(
        self, image_size: tuple[int, int], shape: tuple[float, float], device: torch.device | str
    ) -> torch.Tensor:
        """(Y * X, 4) windows of one shape (height, width), row by row."""
        y1, x1 = torch.meshgrid(
            *(
                torch.arange(num_positions(*sides, self.stride), device=device) * self.stride
                for sides in zip(image_size, shape, strict=True)
            ),
            indexing="ij",
        )
        corners = torch.stack([x1, y1, x1 + shape[1], y1 + shape[0]], dim=2)
        return corners.view(-1, 4).float()


@PROPOSAL_GENERATOR_REGISTRY.register()
class SlidingWindows(ProposalGenerator):
    """Proposes every window of the grid, in evaluation; in training none: nothing is learnt here.

    ``DetectorNetHeads`` with ``MODEL.DETECTORNET.CLASS_AGNOSTIC`` make it the baseline: they
    classify each window, a few at a time, and suppress duplicates.
    """

    stays_in_python = "its windows are laid out in Python for each image's size."

    @configurable
    def __init__(self, *, grid: SlidingGrid):
        """
        Args:
            grid: of the windows.
        """
        super().__init__()
        self.grid = grid
        self.proposals_in_training = False

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec] | None = None) -> dict:
        return {"grid": SlidingGrid.from_config(cfg)}

    def training_losses(self, predictions: ImageList, gt_instances: list[Instances]) -> dict:
        """Nothing is learnt."""
        return {}

    def propose(self, predictions: ImageList) -> list[Instances]:
        """Of each image, windows whose logits only say the order, the largest first."""
        device = predictions.tensor.device
        return [self._propose(tuple(size), device) for size in predictions.image_sizes]

    def _propose(self, image_size: tuple[int, int], device: torch.device) -> Instances:
        windows = self.grid.windows(image_size, device)
        # Float32 tells these apart up to 16 million windows.
        order = -torch.arange(len(windows), device=device, dtype=torch.float32)
        return make_proposals(image_size, windows, order)
