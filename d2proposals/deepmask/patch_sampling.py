"""Drawing training patches: positives around objects, negatives away from them.

Source: DeepMask, Sec. 3 (constraints i and ii) and 3.4. A patch is a canonical positive if an
object is precisely centred in it and the object's longer side has 128 of the patch's 224 pixels.

Shape shorthand in this module:

    M: number of objects in the batch
    P: number of patches
    T: number of tries per negative patch

Naming convention:

    canonical pixels: pixels of an object's canonical patch. An object's longer side has 128.
    object size: the longer side of an object's box, in pixels of the network input. A patch's is
        that of the object which would fill it canonically.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Instances

from .ground_truth import GroundTruth
from .patch_samples import PatchSamples

OTHER_CATEGORIES = ("background", "ignored")


class PatchSampler:
    """Draws patches around the objects of a batch and away from them (Sec. 3.4)."""

    def __init__(
        self,
        *,
        patch_size: int = 224,
        object_size: float = 128.0,
        jitter_shift: float = 16.0,
        jitter_scale: float = 0.25,
        flip: bool = True,
        negative_shift: float = 32.0,
        negative_scale: float = 1.0,
        negative_log2_scales: tuple[float, float] = (-3.0, 2.0),
        positives_in_scale_range: bool = True,
        min_object_area: float = 100.0,
        min_object_side: float = 5.0,
        categories: Sequence[int] = (),
        other_categories: str = "background",
        num_tries: int = 64,
    ) -> None:
        """
        Args:
            patch_size: side of a patch, in its pixels.
            object_size: longer side of a canonical object, in pixels of the patch.
            jitter_shift: positives are off their object's centre by at most this along each axis,
                in canonical pixels.
            jitter_scale: their object is larger or smaller than canonical by at most this, in
                octaves.
            flip: whether half of the patches are mirrored.
            negative_shift: negatives are at least this far, along x or y, from the centre of each
                canonical positive, in its canonical pixels, ...
            negative_scale: ... or differ from it in scale by at least so many octaves.
            negative_log2_scales: range of the octaves by which a native image would be enlarged to
                have the negative in ``patch_size`` pixels.
            positives_in_scale_range: whether objects whose canonical patches are of another scale
                are left out, so that both labels have patches of the same scales, all of them.
                Negatives are then drawn from a range that is wider by ``jitter_scale``.
            min_object_area: smaller objects are left out, in pixels of the native image.
            min_object_side: objects with a shorter side are left out, in the same pixels.
            categories: those whose objects are positive examples; () for all.
            other_categories: "background": objects of other categories are as good as not
                annotated, so that negatives may lie on them, as in the paper. "ignored": no
                negative is similar to their canonical positives either.
            num_tries: places that are tried at once for a negative in an image, before the next
                image's turn.

        Raises:
            ValueError: a jittered object might not fit into its patch, or might be a negative; an
                unknown choice, or numbers that make no sense.
        """
        if object_size <= 0:
            raise ValueError(f"MODEL.DEEPMASK.OBJECT_SIZE must be positive, got {object_size}.")
        if jitter_shift < 0 or jitter_scale < 0:
            raise ValueError(
                "MODEL.DEEPMASK.JITTER_SHIFT and JITTER_SCALE must not be negative, got "
                f"{jitter_shift} and {jitter_scale}."
            )
        reach = (object_size / 2 + jitter_shift) * 2**jitter_scale
        if reach > patch_size / 2:
            raise ValueError(
                "Positive patches must contain their object: (OBJECT_SIZE / 2 + JITTER_SHIFT) * "
                f"2^JITTER_SCALE is {reach:.1f}, above half of MODEL.DEEPMASK.PATCH_SIZE "
                f"{patch_size}."
            )
        for what, jitter, negative in (
            ("SHIFT", jitter_shift, negative_shift),
            ("SCALE", jitter_scale, negative_scale),
        ):
            if negative < jitter:
                raise ValueError(
                    f"MODEL.DEEPMASK.NEGATIVE_{what} must be at least JITTER_{what} {jitter}, or "
                    f"the same patch may be a positive and a negative; got {negative}."
                )
        if len(negative_log2_scales) != 2 or negative_log2_scales[0] >= negative_log2_scales[1]:
            raise ValueError(
                "MODEL.DEEPMASK.NEGATIVE_LOG2_SCALES needs two numbers, the lower one first, got "
                f"{tuple(negative_log2_scales)}."
            )
        if min_object_area < 0 or min_object_side < 0:
            raise ValueError(
                "MODEL.DEEPMASK.MIN_OBJECT_AREA and MIN_OBJECT_SIDE must not be negative, got "
                f"{min_object_area} and {min_object_side}."
            )
        if any(category < 0 for category in categories):
            raise ValueError(
                "MODEL.DEEPMASK.CATEGORIES are numbers of classes from 0 on, got "
                f"{tuple(categories)}."
            )
        if other_categories not in OTHER_CATEGORIES:
            raise ValueError(
                f"MODEL.DEEPMASK.OTHER_CATEGORIES must be one of {OTHER_CATEGORIES}, got "
                f"'{other_categories}'."
            )
        self.patch_size = patch_size
        self.object_size = object_size
        self.jitter_shift = jitter_shift
        self.jitter_scale = jitter_scale
        self.flip = flip
        self.negative_shift = negative_shift
        self.negative_scale = negative_scale
        self.negative_log2_scales = tuple(negative_log2_scales)
        self.positives_in_scale_range = positives_in_scale_range
        self.min_object_area = min_object_area
        self.min_object_side = min_object_side
        self.categories = tuple(categories)
        self.other_categories = other_categories
        self.num_tries = num_tries

    def read_ground_truth(
        self, gt_instances: Sequence[Instances], image_scales: Sequence[float] | None = None
    ) -> GroundTruth:
        """The objects of a batch, with their part in sampling.

        Objects that are too small or of a scale without negatives are neither: no positive is drawn
        of them and no negative near them.

        Args:
            gt_instances: of each image, with ``gt_boxes``; with ``gt_classes`` if there are
                ``categories``; ``gt_areas`` and ``crowd_regions`` are read if there are any.
            image_scales: factor of each image from the network input to the native image; 1 by
                default.
        """
        ground_truth = GroundTruth.from_instances(gt_instances, image_scales)
        if self.categories:
            wanted = torch.as_tensor(list(self.categories), device=ground_truth.boxes.device)
            classes = torch.cat([x.gt_classes for x in gt_instances])
            ground_truth.is_positive = ground_truth.is_positive & torch.isin(classes, wanted)
            if self.other_categories == "background":
                ground_truth.repels = ground_truth.is_positive
        ground_truth.is_positive = ground_truth.is_positive & self._is_in_limits(ground_truth)
        return ground_truth

    def _is_in_limits(self, ground_truth: GroundTruth) -> torch.Tensor:
        """(M,) bool, objects that are neither too small nor of a scale that negatives lack.

        Unlike the paper, which limits an object's size in its patch alone (Sec. 3): area and sides
        as in the authors' later code. Its negatives are never as blurred as its smallest positives,
        which the scale range mends.
        """
        sides = ground_truth.native_sides
        allowed = (ground_truth.areas >= self.min_object_area) & (
            sides.amin(dim=1) >= self.min_object_side
        )
        if self.positives_in_scale_range:
            low, high = self.negative_log2_scales
            octaves = (self.object_size / sides.amax(dim=1)).log2()
            allowed = allowed & (octaves >= low) & (octaves <= high)
        return allowed

    @torch.no_grad()
    def sample(
        self,
        ground_truth: GroundTruth,
        num_positive: int,
        num_negative: int,
    ) -> PatchSamples:
        """Draw positives and negatives.

        If negatives are asked for, as many of both are valid (Sec. 3.2: "an equal number"), unless
        they are asked for in unequal numbers.

        Args:
            ground_truth: of the batch.
            num_positive, num_negative: patches of either kind; their sum is P.

        Returns:
            PatchSamples: positives, then negatives.
        """
        positives = self._sample_positives(ground_truth, num_positive)
        if num_negative == 0:
            return positives
        negatives = self._sample_negatives(ground_truth, num_negative)
        if num_positive == num_negative:
            number = torch.minimum(positives.is_valid.sum(), negatives.is_valid.sum())
            for part in (positives, negatives):
                part.is_valid &= part.is_valid.cumsum(0) <= number
        both = {
            name: torch.cat([getattr(positives, name), getattr(negatives, name)])
            for name in PatchSamples.__dataclass_fields__
            if name != "num_positive"
        }
        return PatchSamples(**both, num_positive=num_positive)

    def _sample_positives(self, ground_truth: GroundTruth, number: int) -> PatchSamples:
        """Canonical positives with jitter.

        Unlike the paper, which does not say which objects: images are drawn evenly, then objects.
        """
        device = ground_truth.boxes.device
        if number == 0 or len(ground_truth.boxes) == 0:
            return self._placeholders(number, device)
        usable = ground_truth.is_positive.float()
        per_image = usable.new_zeros(len(ground_truth.image_sizes))
        per_image.index_add_(0, ground_truth.image_index, usable)
        weight = usable / per_image.clamp(min=1)[ground_truth.image_index]
        # The small weight is for a batch whose objects are all unusable; none of it is valid then.
        index = torch.multinomial(weight + 1e-12, number, replacement=True)
        size = torch.where(ground_truth.is_positive, ground_truth.sizes, 1.0)[index]
        center = torch.where(ground_truth.is_positive[:, None], ground_truth.centers, 0.0)[index]
        jitter = torch.rand(number, 3, device=device) * 2 - 1
        shift = jitter[:, :2] * (self.jitter_shift / self.object_size) * size[:, None]
        return PatchSamples(
            centers=center + shift,
            object_sizes=size * 2 ** (jitter[:, 2] * self.jitter_scale),
            image_index=ground_truth.image_index[index],
            object_index=index,
            flipped=self._draw_flips(number, device),
            is_valid=ground_truth.is_positive[index],
            num_positive=number,
        )

    def _sample_negatives(self, ground_truth: GroundTruth, number: int) -> PatchSamples:
        """Random images, places and scales; the first try of each that is a negative.

        Unlike the paper, which does not say which negatives: all of them, evenly over the image and
        a range of scales. A negative that an image has no room for is drawn again in another one.
        """
        device = ground_truth.boxes.device
        num_images = len(ground_truth.image_sizes)
        # Each negative visits the images in an order of its own.
        orders = torch.rand(number, num_images, device=device).argsort(dim=1)
        image, center = orders[:, 0].clone(), torch.zeros(number, 2, device=device)
        size, found = torch.ones(number, device=device), torch.zeros(number, device=device).bool()
        for visited in orders.unbind(dim=1):
            lacking = (~found).nonzero()[:, 0]
            if len(lacking) == 0:
                break
            image[lacking] = visited[lacking]
            center[lacking], size[lacking], found[lacking] = self._try_places(
                ground_truth, visited[lacking]
            )
        return PatchSamples(
            centers=center,
            object_sizes=size,
            image_index=image,
            object_index=torch.full((number,), -1, device=device),
            flipped=self._draw_flips(number, device),
            is_valid=found,
            num_positive=0,
        )

    def _try_places(
        self, ground_truth: GroundTruth, image: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The first of ``num_tries`` random patches that is a negative, for each of P images.

        Args:
            ground_truth: of the batch.
            image: (P,) int64.

        Returns:
            (P, 2) centres and (P,) object sizes in pixels of the network input, and (P,) bool,
            whether they are negatives.
        """
        draw = torch.rand(len(image), self.num_tries, 3, device=image.device)
        center = draw[..., :2] * ground_truth.image_sizes.flip(1)[image][:, None]  # (P, T, 2)
        low, high = self.negative_log2_scales
        if self.positives_in_scale_range:
            low, high = low - self.jitter_scale, high + self.jitter_scale
        size = self.object_size * 2 ** -(low + (high - low) * draw[..., 2])  # (P, T)
        size = size / ground_truth.image_scales[image][:, None]
        allowed = self.is_negative(ground_truth, center, size, image[:, None].expand_as(size))
        slot, first = torch.arange(len(image), device=image.device), allowed.int().argmax(dim=1)
        return center[slot, first], size[slot, first], allowed[slot, first]

    def is_negative(
        self,
        ground_truth: GroundTruth,
        centers: torch.Tensor,
        object_sizes: torch.Tensor,
        image_index: torch.Tensor,
    ) -> torch.Tensor:
        """Whether patches are far enough from every canonical positive of their image.

        Unlike the paper, which does not mention crowd regions, no negative is centred in one.

        Args:
            ground_truth: of the batch.
            centers: (..., 2) x, y in pixels of the network input.
            object_sizes: (...) of the patches.
            image_index: (...) int64.

        Returns:
            Tensor: (...) bool.
        """
        # (..., M) from here on
        distance = (centers[..., None, :] - ground_truth.centers).abs().amax(dim=-1)
        far = distance * (self.object_size / ground_truth.sizes) >= self.negative_shift
        octaves = (object_sizes[..., None] / ground_truth.sizes).log2().abs()
        far = far | (octaves >= self.negative_scale)
        elsewhere = image_index[..., None] != ground_truth.image_index
        far_from_all = (far | elsewhere | ~ground_truth.repels).all(dim=-1)
        return far_from_all & ~ground_truth.in_crowd(centers, image_index)

    def _draw_flips(self, number: int, device: torch.device) -> torch.Tensor:
        return (torch.rand(number, device=device) < 0.5) & self.flip

    def _placeholders(self, number: int, device: torch.device) -> PatchSamples:
        """Patches of the first pixel that count for nothing."""
        zeros = torch.zeros(number, device=device)
        return PatchSamples(
            centers=torch.zeros(number, 2, device=device),
            object_sizes=zeros + 1,
            image_index=zeros.long(),
            object_index=zeros.long() - 1,
            flipped=zeros.bool(),
            is_valid=zeros.bool(),
            num_positive=number,
        )

    def boxes(self, samples: PatchSamples, context: int = 0) -> torch.Tensor:
        """Where patches are cut, (P, 4) XYXY in pixels of the network input.

        Args:
            samples: P patches.
            context: border on each side, in pixels of the patch.
        """
        half = samples.object_sizes * ((self.patch_size / 2 + context) / self.object_size)
        half = half[:, None]
        return torch.cat([samples.centers - half, samples.centers + half], dim=1)


def check_categories(categories: Sequence[int], datasets: Sequence[str]) -> None:
    """Raise ValueError for classes that a training set does not have, if it says which it has."""
    for name in datasets:
        if name not in DatasetCatalog:
            continue
        classes = MetadataCatalog.get(name).get("thing_classes")
        unknown = [x for x in categories if classes and not 0 <= x < len(classes)]
        if unknown:
            raise ValueError(
                f"MODEL.DEEPMASK.CATEGORIES names {unknown}, but {name} has the classes 0 to "
                f"{len(classes) - 1}."
            )
