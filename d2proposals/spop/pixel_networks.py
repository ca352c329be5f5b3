"""SPOP's networks together: what they say of each pixel, in training and at one scale of the test.

Source: Z. Jie, X. Liang, J. Feng, W. F. Lu, E. H. F. Tay and S. Yan, "Scale-aware Pixel-wise Object
Proposal Networks", IEEE Transactions on Image Processing 25, 2016, Sec. III-A to III-C, Fig. 6.

Shape shorthand in this module:

    N: number of images in the batch
    H, W: height and width of an image, in pixels of the network input
    Hm, Wm: height and width of the networks' maps, in cells; cell (i, j) is centred on pixel
        (8 * i, 8 * j)
    T: number of cells in the batch
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from detectron2.structures import ImageList
from torch import nn

from ..proposals.image_pyramid import resize_image
from .networks import coordinate_map
from .pixel_proposals import LOCALIZATIONS, fuse_coordinates, two_way_log_odds
from .tiles import run_in_tiles


class PixelPredictions(NamedTuple):
    """What the networks say of all T cells of a batch, image by image, row by row.

    Attributes:
        objectness: (T, 2) logits of background and foreground.
        size: (T, 2) logits of small and large; None without scale-awareness.
        coordinates: (T, 4) by localisation network, in units of the normaliser.
        map_sizes: (Hm, Wm) of each image.
    """

    objectness: torch.Tensor
    size: torch.Tensor | None
    coordinates: dict[str, torch.Tensor]
    map_sizes: list[tuple[int, int]]


class PixelMaps(NamedTuple):
    """What the networks say of one image at one scale.

    Attributes:
        objectness: (Hm, Wm) log-odds of an object.
        size: (Hm, Wm) log-odds of a large one; None without scale-awareness.
        coordinates: (4, Hm, Wm) after fusion, in units of the normaliser.
        scale: (y, x) pixels of the resized image per pixel of the image.
    """

    objectness: torch.Tensor
    size: torch.Tensor | None
    coordinates: torch.Tensor
    scale: tuple[float, float]


class PixelNetworks(nn.Module):
    """The confidence network and the localisation networks; none shares anything with another."""

    def __init__(
        self,
        *,
        confidence: nn.Module,
        localization: dict[str, nn.Module],
        pixel_normalization: nn.Module,
        localization_at_test: str = "fused",
        tile_size: int = 1536,
    ):
        """
        Args:
            confidence: a :class:`ConfidenceNetwork`.
            localization: :class:`LocalizationNetwork` by the objects they are trained on:
                "large_size" and "small_size", or "all_sizes" alone (without scale-awareness).
            pixel_normalization: of the model to that of the networks.
            localization_at_test: "fused" (Eq. 5), or one of the two networks alone.
            tile_size: images larger than this and the overlap go through the networks in parts of
                this side, in pixels, see :func:`run_in_tiles`.

        Raises:
            ValueError: unknown names, or settings that exclude each other.
        """
        super().__init__()
        self.confidence = confidence
        self.localization = nn.ModuleDict(localization)
        self.pixel_normalization = pixel_normalization
        self.localization_at_test = localization_at_test
        self.tile_size = tile_size
        self.stride = confidence.stride
        # The confidence network sees the most: its branches come on top of the trunk.
        self.receptive_field = confidence.receptive_field
        self.normalizer = next(iter(localization.values())).normalizer
        self._check_settings()
        # Convolutions are faster in this layout; images are brought to it in ``_normalize``.
        self.to(memory_format=torch.channels_last)

    def _check_settings(self) -> None:
        """Raise ValueError for names that do not exist and settings that make no sense."""
        if self.localization_at_test not in LOCALIZATIONS:
            raise ValueError(
                f"Unknown MODEL.SPOP.LOCALIZATION {self.localization_at_test!r}; "
                f"use one of {LOCALIZATIONS}."
            )
        if not self.is_scale_aware and self.localization_at_test != "fused":
            raise ValueError(
                f"MODEL.SPOP.LOCALIZATION {self.localization_at_test!r} needs MODEL.SPOP."
                "SCALE_AWARE True: without it there is one network for all sizes."
            )
        if not self.normalizer > 0:
            raise ValueError(
                f"MODEL.SPOP.NORMALIZER must be positive pixels, got {self.normalizer}."
            )
        if self.tile_size < self.stride or self.tile_size % self.stride:
            raise ValueError(
                f"MODEL.SPOP.TILE_SIZE must be a positive multiple of {self.stride} pixels, got "
                f"{self.tile_size}."
            )

    @property
    def is_scale_aware(self) -> bool:
        """Whether there are two localisation networks, for large and for small objects."""
        return "all_sizes" not in self.localization

    def forward(self, images: ImageList) -> PixelPredictions:
        """Run the networks on the images at the size that they have, as in training.

        Args:
            images: N images, normalised for the model and padded.
        """
        objectness, sizes, map_sizes = [], [], []
        coordinates: dict[str, list[torch.Tensor]] = {name: [] for name in self.localization}
        for batch in _without_padding(images):
            batch = self._normalize(batch)
            confidence = self.confidence(batch)
            objectness.append(_by_cell(confidence.objectness))
            if confidence.size is not None:
                sizes.append(_by_cell(confidence.size))
            for name, network in self.localization.items():
                coordinates[name].append(_by_cell(network(batch)))
            map_sizes += [tuple(confidence.objectness.shape[-2:])] * len(batch)
        return PixelPredictions(
            torch.cat(objectness),
            torch.cat(sizes) if sizes else None,
            {name: torch.cat(x) for name, x in coordinates.items()},
            map_sizes,
        )

    @torch.no_grad()
    def predict_maps(self, image: torch.Tensor, size: tuple[int, int]) -> PixelMaps:
        """Run the networks on one image at one scale.

        Args:
            image: (3, H, W) normalised for the model, without padding.
            size: (height, width) to which it is resized for this scale, in pixels.

        Returns:
            PixelMaps: of the cells centred inside the resized image; ceil(side / 8) along a side.
        """
        resized = resize_image(image, size)
        factors = [a / b for a, b in zip(resized.shape[-2:], image.shape[-2:], strict=True)]
        objectness, *size, offsets = run_in_tiles(
            self._run_networks,
            resized,
            stride=self.stride,
            receptive_field=self.receptive_field,
            tile_size=self.tile_size,
        )
        # Added to the joined maps: in each tile the coordinates would begin at 0 again.
        coordinates = offsets + coordinate_map(
            tuple(offsets.shape[-2:]), self.stride, self.normalizer, offsets.device
        )
        return PixelMaps(objectness[0], size[0][0] if size else None, coordinates, tuple(factors))

    def _normalize(self, x: torch.Tensor) -> torch.Tensor:
        """Pixels (N, 3, h, w) normalised for the model to those that the networks expect."""
        return self.pixel_normalization(x).contiguous(memory_format=torch.channels_last)

    def _run_networks(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Log-odds of an object and, if scale-aware, of a large one, and fused offsets.

        Args:
            x: (1, 3, h, w) normalised for the model.

        Returns:
            list[Tensor]: (1, 1, Hm, Wm), (1, 1, Hm, Wm) if scale-aware, (1, 4, Hm, Wm).
        """
        # Here, so that a large image is never normalised as a whole.
        x = self._normalize(x)
        confidence = self.confidence(x)
        maps = [two_way_log_odds(confidence.objectness)[:, None]]
        if confidence.size is None:
            return [*maps, self.localization["all_sizes"].offsets(x)]
        maps.append(two_way_log_odds(confidence.size)[:, None])
        if self.localization_at_test != "fused":
            return [*maps, self.localization[self.localization_at_test].offsets(x)]
        large, small = (self.localization[name].offsets(x) for name in ("large_size", "small_size"))
        # The weights of Eq. 5 sum to 1: fused offsets are offsets of the fused coordinates.
        return [*maps, fuse_coordinates(large, small, confidence.size)]


def _without_padding(images: ImageList) -> list[torch.Tensor]:
    """The images in batches (N, 3, H, W) of one size, in their order, without padding.

    Padding is zero in the input alone: biases make it something else in the first hidden map, which
    the border of the image would then see.
    """
    sizes = [tuple(size) for size in images.image_sizes]
    if len(set(sizes)) == 1:
        height, width = sizes[0]
        return [images.tensor[:, :, :height, :width]]
    return [images.tensor[i : i + 1, :, :h, :w] for i, (h, w) in enumerate(sizes)]


def _by_cell(maps: torch.Tensor) -> torch.Tensor:
    """(N, C, Hm, Wm) -> (N * Hm * Wm, C)."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)
