"""What each cell of SPOP's maps is trained to say: is there an object, is it large, its box.

Source: Z. Jie, X. Liang, J. Feng, W. F. Lu, E. H. F. Tay and S. Yan, "Scale-aware Pixel-wise Object
Proposal Networks", IEEE Transactions on Image Processing 25, 2016, Sec. III-A, III-B, IV-A.

Shape shorthand in this module:

    H, W: height and width of one image, in pixels of the network input
    Hm, Wm: height and width of the output map, in cells; cell (i, j) is centred on pixel
        (stride * i, stride * j)
    M: number of objects in an image
    T: number of cells, of one image or of the whole batch
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks

logger = logging.getLogger(__name__)

FOREGROUND, BACKGROUND, IGNORED = 1, 0, -1


@dataclass
class PixelTargets:
    """Targets of T cells, row by row within an image.

    Attributes:
        objectness: (T,) int64, FOREGROUND, BACKGROUND, or IGNORED: in a crowd region or centred
            outside the image.
        object_index: (T,) int64, the object that a foreground cell belongs to, -1 for others.
        is_large: (T,) bool, whether that object is large; False for others.
        boxes: (T, 4) float32, its box XYXY in units of the normaliser; 0 for others.
        num_objects: of all images together, with those that no cell belongs to.
    """

    objectness: torch.Tensor
    object_index: torch.Tensor
    is_large: torch.Tensor
    boxes: torch.Tensor
    num_objects: int

    @property
    def is_foreground(self) -> torch.Tensor:
        """(T,) bool: p* of Eq. 1."""
        return self.objectness == FOREGROUND

    @property
    def is_small(self) -> torch.Tensor:
        """(T,) bool: s* of Eq. 3."""
        return self.is_foreground & ~self.is_large

    @staticmethod
    def cat(targets: Sequence[PixelTargets]) -> PixelTargets:
        """Join the targets of several images; objects are numbered on."""
        indices, num_objects = [], 0
        for x in targets:
            indices.append(torch.where(x.object_index >= 0, x.object_index + num_objects, -1))
            num_objects += x.num_objects
        return PixelTargets(
            objectness=torch.cat([x.objectness for x in targets]),
            object_index=torch.cat(indices),
            is_large=torch.cat([x.is_large for x in targets]),
            boxes=torch.cat([x.boxes for x in targets]),
            num_objects=num_objects,
        )


class PixelLabeler:
    """Makes :class:`PixelTargets` of ground truth."""

    def __init__(self, *, stride: int, normalizer: float, large_area: float = 2000.0):
        """
        Args:
            stride: pixels per cell.
            normalizer: pixels per unit of the coordinates.
            large_area: objects of at least this area are large, in pixels of the original image.
        """
        self.stride = stride
        self.normalizer = normalizer
        self.large_area = large_area
        self._warned_of_areas = False

    @torch.no_grad()
    def __call__(
        self,
        gt: Instances,
        map_size: tuple[int, int],
        image_size: tuple[int, int] | None = None,
    ) -> PixelTargets:
        """Label the cells of one image.

        The ground truth is brought to the size of the map by reading it at the pixels that the
        cells are centred on. Where objects overlap, the smaller one wins; an object that covers no
        such pixel is not seen.

        Args:
            gt: of an image of (H, W), with ``gt_boxes`` and ``gt_masks`` (bit masks or polygons);
                with ``gt_areas`` (M,), objects' areas in the original image (else their masks'
                areas here), and ``crowd_regions`` where the mapper provides them.
            map_size: (Hm, Wm).
            image_size: (height, width) of the image that the map is of, in pixels, where that is a
                copy of another size than ``gt`` is of: cells and boxes refer to it.

        Returns:
            PixelTargets: T = Hm * Wm cells.

        Raises:
            ValueError: there are no masks.
        """
        image_size = gt.image_size if image_size is None else image_size
        factor = [copy / side for copy, side in zip(image_size, gt.image_size, strict=True)]
        masks = self._masks(gt)
        boxes = _scaled(gt.gt_boxes, factor).tensor
        areas = self._areas(gt, masks, factor)
        at_cells = self._at_cells(masks.tensor, image_size)
        object_index = self._object_map(at_cells, areas, map_size).flatten()
        is_object = object_index >= 0
        objectness = torch.where(is_object, FOREGROUND, BACKGROUND)
        is_crowd = self._is_crowd(gt, map_size, image_size).to(boxes.device)
        objectness[~is_object & is_crowd] = IGNORED
        objectness[~self._is_inside(image_size, map_size, boxes.device)] = IGNORED
        # A row for the cells without an object, to which their index -1 leads.
        boxes = torch.cat([boxes / self.normalizer, boxes.new_zeros(1, 4)])
        is_large = torch.cat([areas >= self.large_area, areas.new_zeros(1, dtype=torch.bool)])
        return PixelTargets(
            objectness, object_index, is_large[object_index], boxes[object_index].float(), len(gt)
        )

    def _masks(self, gt: Instances) -> BitMasks:
        """The objects' masks, (M, H, W)."""
        masks = gt.gt_masks if gt.has("gt_masks") else None
        if masks is None and len(gt) == 0:
            return BitMasks(torch.zeros(0, *gt.image_size, dtype=torch.bool))
        if isinstance(masks, PolygonMasks):
            return BitMasks.from_polygon_masks(masks, *gt.image_size)
        if not isinstance(masks, BitMasks):
            raise ValueError(
                "SPOP learns from instance masks and the training images come without: set "
                "INPUT.USE_INSTANCE_MASK True, with a dataset that has masks ('segmentation')."
            )
        return masks

    def _at_cells(self, masks: torch.Tensor, image_size: tuple[int, int]) -> torch.Tensor:
        """Masks (M, H, W) at the centres of the cells inside a copy of ``image_size``."""
        rows, columns = (
            # The pixel that the middle of the copy's pixel i * stride lies in: exact in integers.
            (2 * torch.arange(0, copy, self.stride, device=masks.device) + 1) * side // (2 * copy)
            for copy, side in zip(image_size, masks.shape[1:], strict=True)
        )
        return masks[:, rows[:, None], columns]

    def _areas(self, gt: Instances, masks: BitMasks, factor: Sequence[float]) -> torch.Tensor:
        """(M,) areas by which objects are large or small."""
        if gt.has("gt_areas"):
            return gt.gt_areas
        if len(gt) > 0 and not self._warned_of_areas:
            self._warned_of_areas = True
            logger.warning(
                "The ground truth has no gt_areas (d2proposals' mapper adds them): SPOP tells "
                "large from small objects by their areas in the images that it trains on."
            )
        areas = masks.tensor.flatten(1).sum(dim=1).to(gt.gt_boxes.tensor)
        return areas * (factor[0] * factor[1])

    def _object_map(
        self, at_cells: torch.Tensor, areas: torch.Tensor, map_size: tuple[int, int]
    ) -> torch.Tensor:
        """(Hm, Wm) int64 index of each cell's object, -1 without one.

        Args:
            at_cells: (M, rows, columns) bool masks at the cells inside the image.
            areas: (M,).
            map_size: (Hm, Wm).
        """
        # Masks of polygons are made on the CPU.
        at_cells = at_cells.to(areas.device)
        order = areas.argsort(stable=True)  # smallest first
        num_objects = len(order)
        place = torch.arange(num_objects, device=order.device)[:, None, None]
        # One more, without an object, at the end: every cell finds one.
        first = torch.full(at_cells.shape[1:], num_objects, device=order.device)
        if num_objects:
            first = torch.where(at_cells[order], place, num_objects).amin(dim=0)
        index = torch.cat([order, order.new_full((1,), -1)])[first]
        object_map = index.new_full(map_size, -1)
        rows, columns = index.shape
        object_map[:rows, :columns] = index
        return object_map

    def _is_inside(
        self, image_size: tuple[int, int], map_size: tuple[int, int], device: torch.device
    ) -> torch.Tensor:
        """(T,) bool: cells centred inside the image."""
        rows, columns = (
            torch.arange(cells, device=device) * self.stride < side
            for cells, side in zip(map_size, image_size, strict=True)
        )
        return (rows[:, None] & columns).flatten()

    def _is_crowd(
        self, gt: Instances, map_size: tuple[int, int], image_size: tuple[int, int]
    ) -> torch.Tensor:
        """(T,) bool: cells in crowd regions: their masks, else their boxes."""
        is_crowd = torch.zeros(map_size, dtype=torch.bool)
        if not gt.has("crowd_regions"):
            return is_crowd.flatten()
        regions = gt.crowd_regions
        if regions.masks is not None:
            at_cells = self._at_cells(regions.masks.tensor, image_size).any(dim=0)
            is_crowd = is_crowd.to(at_cells.device)
            is_crowd[: at_cells.shape[0], : at_cells.shape[1]] = at_cells
        else:
            factor = [copy / side for copy, side in zip(image_size, gt.image_size, strict=True)]
            boxes = _scaled(regions.boxes, factor)
            is_crowd = _cells_in_boxes(boxes, map_size, self.stride).any(dim=0)
        return is_crowd.flatten()


def sample_large_objects(
    targets: PixelTargets, num_samples: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """The cells that train the large/small branch: all of small objects, some of large ones.

    Unlike the paper, which draws 100 pixels of each large object, at most as many as the object has
    cells can be drawn: at stride 8 the smallest large object has about 31.

    Args:
        targets: of T cells.
        num_samples: cells drawn of each large object.
        generator: of the random numbers, on the targets' device.

    Returns:
        Tensor: (K,) int64 indices of the cells.
    """
    cells = (targets.is_foreground & targets.is_large).nonzero()[:, 0]
    # Cells in random order, then stably by object: each object's come in random order.
    cells = cells[torch.rand(len(cells), device=cells.device, generator=generator).argsort()]
    objects, order = targets.object_index[cells].sort(stable=True)
    cells = cells[order]
    place = torch.arange(len(cells), device=cells.device) - torch.searchsorted(objects, objects)
    return torch.cat([targets.is_small.nonzero()[:, 0], cells[place < num_samples]])


def _scaled(boxes: Boxes, factor: Sequence[float]) -> Boxes:
    """Boxes times a factor (y, x)."""
    y, x = factor
    return Boxes(boxes.tensor * boxes.tensor.new_tensor([x, y, x, y]))


def _cells_in_boxes(boxes: Boxes, map_size: tuple[int, int], stride: int) -> torch.Tensor:
    """(K, Hm, Wm) bool: whether each cell's pixel has its centre in each of K boxes."""
    y, x = (torch.arange(n, device=boxes.device) * stride + 0.5 for n in map_size)
    x1, y1, x2, y2 = boxes.tensor[:, :, None].unbind(dim=1)  # (K, 1) each
    in_rows, in_columns = (y >= y1) & (y < y2), (x >= x1) & (x < x2)
    return in_rows[:, :, None] & in_columns[:, None, :]
