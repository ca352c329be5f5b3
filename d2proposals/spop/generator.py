"""SPOP: a box from every pixel, by two networks for two sizes of objects.

Source: Z. Jie, X. Liang, J. Feng, W. F. Lu, E. H. F. Tay and S. Yan, "Scale-aware Pixel-wise Object
Proposal Networks", IEEE Transactions on Image Processing 25, 2016 (arXiv 1601.04798).

Shape shorthand in this module:

    N: number of images in the batch
    H, W: height and width of an image, in pixels of the network input
    Hm, Wm: height and width of the networks' maps, in cells; cell (i, j) is centred on pixel
        (8 * i, 8 * j)
    T: number of cells, of one image at one scale or of the whole batch
    R: number of proposals of one image

Naming convention:

    objectness: p of the paper, whether a cell is on an object. size: z, whether on a large one.
    coordinates: boxes in units of the normaliser, t of the paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY
from detectron2.structures import ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import nn

from ..proposals.evaluation_mode import in_evaluation
from ..proposals.image_pyramid import resize_image, scaled_size
from ..proposals.native_size import NativeSizes
from ..proposals.proposal_generator import ProposalGenerator
from .building import build_networks, build_refinement
from .losses import LOCALIZATION_LOSS_TYPES, localization_loss, two_way_loss
from .pixel_networks import PixelPredictions
from .pixel_proposals import PixelProposals, to_image_pixels
from .pixel_targets import PixelLabeler, PixelTargets, sample_large_objects
from .proposal_selection import best_proposals, select_proposals
from .superpixel_refinement import SuperpixelRefinement


@PROPOSAL_GENERATOR_REGISTRY.register()
class SPOP(ProposalGenerator):
    """SPOP on the images themselves; the meta-architecture's feature maps are not used."""

    stays_in_python = (
        "its superpixels come from scikit-image, and the sizes of its pyramid are computed in "
        "Python for each image."
    )

    @configurable
    def __init__(
        self,
        *,
        networks: nn.Module,
        labeler: PixelLabeler,
        refinement: SuperpixelRefinement | None,
        samples_per_large_object: int = 100,
        box_reg_loss_type: str = "squared_l2",
        loss_weight: dict[str, float] | None = None,
        trains_at_native_size: bool = False,
        scales: Sequence[float] = (1.0, 2.0),
        native_sizes: NativeSizes | None = None,
        pre_nms_topk: tuple[int, int] = (6000, 20000),
        nms_thresh: float = 0.8,
        post_nms_topk: tuple[int, int] = (2000, 1000),
        min_box_size: float = 0.0,
        proposals_in_training: bool = True,
    ):
        """
        Args:
            networks: a :class:`PixelNetworks`.
            labeler: makes the targets.
            refinement: adds two versions of each proposal; None for none.
            samples_per_large_object: cells of a large object that train the size branch.
            box_reg_loss_type: "squared_l2" or "l2", see :func:`localization_loss`.
            loss_weight: of the losses in :meth:`losses`, 1 for those that are absent.
            trains_at_native_size: whether training images are brought to the size that ``scales``
                refer to.
            scales: factors on the image, of which all proposals are pooled (Sec. III-C).
            native_sizes: says which size of an image ``scales`` refer to; by default, that of the
                image as it was taken.
            pre_nms_topk: (training, test) best initial proposals that are refined.
            nms_thresh: IoU threshold of the NMS.
            post_nms_topk: (training, test) proposals per image.
            min_box_size: smaller proposals are dropped, in pixels of the network input.
            proposals_in_training: whether to decode proposals in training.

        Raises:
            ValueError: unknown names, or settings that exclude each other.
        """
        super().__init__()
        self.networks = networks
        self.labeler = labeler
        self.refinement = refinement
        self.samples_per_large_object = samples_per_large_object
        self.box_reg_loss_type = box_reg_loss_type
        self.loss_weight = dict(loss_weight or {})
        self.trains_at_native_size = trains_at_native_size
        self.scales = tuple(scales)
        self.native_sizes = native_sizes or NativeSizes("MODEL.SPOP")
        # Map from self.training state to train/test settings
        self.pre_nms_topk = {True: pre_nms_topk[0], False: pre_nms_topk[1]}
        self.post_nms_topk = {True: post_nms_topk[0], False: post_nms_topk[1]}
        self.nms_thresh = nms_thresh
        self.min_box_size = min_box_size
        self.proposals_in_training = proposals_in_training
        self._check_settings()

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        node = cfg.MODEL.SPOP
        networks = build_networks(cfg)
        weight = node.LOSS_WEIGHT
        return {
            "networks": networks,
            "labeler": PixelLabeler(
                stride=networks.stride, normalizer=node.NORMALIZER, large_area=node.LARGE_AREA
            ),
            "refinement": build_refinement(cfg),
            "samples_per_large_object": node.SAMPLES_PER_LARGE_OBJECT,
            "box_reg_loss_type": node.BBOX_REG_LOSS_TYPE,
            "loss_weight": {
                "loss_spop_objectness": weight * node.OBJECTNESS_LOSS_WEIGHT,
                "loss_spop_size": weight * node.SIZE_LOSS_WEIGHT,
                **{
                    f"loss_spop_{name}": weight * node.BBOX_REG_LOSS_WEIGHT
                    for name in networks.localization
                },
            },
            "trains_at_native_size": node.TRAIN_AT_NATIVE_SIZE,
            "scales": node.SCALES,
            "native_sizes": NativeSizes(
                "MODEL.SPOP", short_edge=node.NATIVE_SHORT_EDGE, long_edge=node.NATIVE_LONG_EDGE
            ),
            "pre_nms_topk": (node.PRE_NMS_TOPK_TRAIN, node.PRE_NMS_TOPK_TEST),
            "nms_thresh": node.NMS_THRESH,
            "post_nms_topk": (node.POST_NMS_TOPK_TRAIN, node.POST_NMS_TOPK_TEST),
            "min_box_size": node.MIN_BOX_SIZE,
            "proposals_in_training": cfg.MODEL.PROPOSAL_GENERATOR.PROPOSALS_IN_TRAINING,
        }

    def _check_settings(self) -> None:
        """Raise ValueError for names that do not exist and settings that make no sense."""
        if self.box_reg_loss_type not in LOCALIZATION_LOSS_TYPES:
            raise ValueError(
                f"Unknown MODEL.SPOP.BBOX_REG_LOSS_TYPE {self.box_reg_loss_type!r}; "
                f"use one of {LOCALIZATION_LOSS_TYPES}."
            )
        are_positive = (isinstance(x, (int, float)) and 0 < x < math.inf for x in self.scales)
        if not self.scales or not all(are_positive):
            raise ValueError(
                f"MODEL.SPOP.SCALES must be one or more positive factors, got {self.scales}."
            )
        if not 0 <= self.nms_thresh <= 1:
            raise ValueError(f"MODEL.SPOP.NMS_THRESH must be in [0, 1], got {self.nms_thresh}.")
        at_least_1 = {
            "SAMPLES_PER_LARGE_OBJECT": self.samples_per_large_object,
            "PRE_NMS_TOPK_TRAIN": self.pre_nms_topk[True],
            "PRE_NMS_TOPK_TEST": self.pre_nms_topk[False],
            "POST_NMS_TOPK_TRAIN": self.post_nms_topk[True],
            "POST_NMS_TOPK_TEST": self.post_nms_topk[False],
        }
        for key, value in at_least_1.items():
            if value < 1:
                raise ValueError(f"MODEL.SPOP.{key} must be at least 1, got {value}.")

    @torch.no_grad()
    def label_and_sample_pixels(
        self,
        map_sizes: Sequence[tuple[int, int]],
        gt_instances: Sequence[Instances],
        image_sizes: Sequence[tuple[int, int]] | None = None,
    ) -> tuple[PixelTargets, torch.Tensor]:
        """Label all cells, and choose those that train the large/small branch.

        Args:
            map_sizes: (Hm, Wm) of each image.
            gt_instances: of each image, see :class:`PixelLabeler`.
            image_sizes: (height, width) of the images that the maps are of; by default, of the
                images that ``gt_instances`` are of.

        Returns:
            PixelTargets: of T cells, in the order of :class:`PixelPredictions`.
            Tensor: (K,) int64 indices of the chosen cells.
        """
        if image_sizes is None:
            image_sizes = [gt.image_size for gt in gt_instances]
        targets = PixelTargets.cat(
            [self.labeler(*x) for x in zip(gt_instances, map_sizes, image_sizes, strict=True)]
        )
        size_cells = sample_large_objects(targets, self.samples_per_large_object)
        # One transfer from the device for all numbers.
        is_ignored = targets.objectness < 0
        counts = torch.stack([targets.is_large.sum(), targets.is_small.sum(), is_ignored.sum()])
        storage = get_event_storage()
        names = ("num_pos_large", "num_pos_small", "num_ignored")
        for name, count in zip(names, counts.tolist(), strict=True):
            storage.put_scalar(f"spop/{name}", count / len(map_sizes))
        return targets, size_cells

    def losses(
        self, predictions: PixelPredictions, targets: PixelTargets, size_cells: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Eq. 1-4.

        Unlike the paper, which trains the three networks separately, they are trained together:
        they share no weights, so the sum of their losses has the same gradients.

        Args:
            predictions: of T cells.
            targets: of the same cells.
            size_cells: (K,) indices of the cells that train the large/small branch.

        Returns:
            dict[str, Tensor]: weighted losses: "loss_spop_objectness" and "loss_spop_size" (the two
            terms of Eq. 4), "loss_spop_large_size" (Eq. 2) and "loss_spop_small_size" (Eq. 3);
            without scale-awareness "loss_spop_objectness" and "loss_spop_all_sizes" (Eq. 1).
        """
        is_foreground = targets.is_foreground
        losses = {
            "loss_spop_objectness": two_way_loss(
                predictions.objectness, is_foreground, targets.objectness >= 0
            )
        }
        if predictions.size is not None:
            losses["loss_spop_size"] = two_way_loss(predictions.size, targets.is_large, size_cells)
        is_trained = {
            "large_size": targets.is_large,
            "small_size": targets.is_small,
            "all_sizes": is_foreground,
        }
        for name, coordinates in predictions.coordinates.items():
            losses[f"loss_spop_{name}"] = localization_loss(
                coordinates, targets.boxes, is_trained[name], self.box_reg_loss_type
            )
        return {name: loss * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}

    def training_losses(
        self, predictions: ImageList, gt_instances: list[Instances]
    ) -> dict[str, torch.Tensor]:
        """See :meth:`losses`; of images, with ``gt_masks``.

        Raises:
            ValueError: the ground truth has no masks.
        """
        shown = self.training_images(predictions)
        maps = self.networks(shown)
        targets, size_cells = self.label_and_sample_pixels(
            maps.map_sizes, gt_instances, shown.image_sizes
        )
        return self.losses(maps, targets, size_cells)

    def training_images(self, images: ImageList) -> ImageList:
        """The images that the networks learn from: as they come, or at their own size."""
        if not self.trains_at_native_size:
            return images
        sizes = self.native_sizes(images.image_sizes)
        return ImageList.from_tensors(
            [resize_image(images[i], size) for i, size in enumerate(sizes)]
        )

    @torch.no_grad()
    def predict_proposals(self, images: ImageList) -> list[Instances]:
        """Proposals of each image, from all scales (Sec. III-C, III-D)."""
        native_sizes = self.native_sizes(images.image_sizes)
        # Images one by one, without the padding of the batch; their superpixels meanwhile.
        with in_evaluation(self.networks), self._superpixels(images, native_sizes) as superpixels:
            return [
                self._predict_image(images[i], native_size, superpixels[i])
                for i, native_size in enumerate(native_sizes)
            ]

    @contextmanager
    def _superpixels(
        self, images: ImageList, native_sizes: Sequence[tuple[int, int]]
    ) -> Iterator[list[Callable[[], torch.Tensor | None]]]:
        """Begin with the superpixels of all images; yields what waits for those of each.

        They are computed on the CPU, of the images at their own size. Of larger ones than a
        detector's images are brought back to, a smaller copy has the same 200 at less cost.
        """
        if self.refinement is None:
            yield [lambda: None] * len(native_sizes)
            return
        copies = [
            self.networks.pixel_normalization.to_rgb(
                resize_image(images[i], self.native_sizes.bounded(size))
            ).cpu()
            for i, size in enumerate(native_sizes)
        ]
        with self.refinement.segmented_beside(copies) as superpixels:
            yield superpixels

    def _pixel_proposals(self, image: torch.Tensor, native_size: tuple[int, int]) -> PixelProposals:
        """Initial proposals of all cells at all scales, see :meth:`_predict_image`."""
        boxes, logits = [], []
        for scale in self.scales:
            maps = self.networks.predict_maps(image, scaled_size(native_size, scale))
            boxes.append(to_image_pixels(maps.coordinates, self.networks.normalizer, maps.scale))
            logits.append(maps.objectness.flatten())
        return PixelProposals(torch.cat(boxes), torch.cat(logits))

    def _predict_image(
        self,
        image: torch.Tensor,
        native_size: tuple[int, int],
        superpixels: Callable[[], torch.Tensor | None],
    ) -> Instances:
        """Proposals of one image.

        Args:
            image: (3, H, W) normalised for the model, without padding.
            native_size: (height, width) at scale 1, in pixels.
            superpixels: returns those of the image, see :func:`select_proposals`.
        """
        initial = self._pixel_proposals(image, native_size)
        if self.training and not all(x.isfinite().all() for x in initial):
            raise FloatingPointError("SPOP predicts Inf or NaN: training has diverged.")
        labels = superpixels()
        return select_proposals(
            best_proposals(initial, self.pre_nms_topk[self.training]),
            tuple(image.shape[-2:]),
            nms_thresh=self.nms_thresh,
            topk=self.post_nms_topk[self.training],
            min_box_size=self.min_box_size,
            refinement=self.refinement,
            superpixels=None if labels is None else labels.to(image.device),
        )
