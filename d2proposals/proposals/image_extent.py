"""Where the images of a padded batch end, and which cells of a feature map lie inside them.

Detectron2 pads a batch with zeros at the right and the bottom and hands a backbone the padded
tensor alone. Whatever looks further than a neighbourhood (global pools, windows, top-k) has to
know where an image ends, or its result depends on the other images of the batch.

Shape shorthand in this module:

    N: number of images in the batch
    H, W: height and width of the padded batch, in pixels
    Hi, Wi: height and width of a feature map, in cells
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def recover_image_sizes(batch: torch.Tensor) -> torch.Tensor:
    """Sizes of the images in a batch that was padded with zeros at the right and the bottom.

    An image whose last rows or columns are zero themselves - every pixel exactly the mean that
    was subtracted - comes out smaller than it is by those rows or columns.

    Args:
        batch: (N, C, H, W) normalised pixels.

    Returns:
        Tensor: (N, 2) int64 (height, width) in pixels, at least 1.
    """
    is_pixel = batch.ne(0).any(dim=1)  # (N, H, W)
    sizes = []
    for dim in (2, 1):
        occupied = is_pixel.any(dim=dim)  # (N, H) or (N, W)
        position = torch.arange(1, occupied.shape[1] + 1, device=batch.device)
        sizes.append((occupied * position).amax(dim=1))
    return torch.stack(sizes, dim=1).clamp(min=1)


def stack_image_sizes(
    image_sizes: Sequence[Sequence[int | torch.Tensor] | torch.Tensor],
    device: torch.device | str,
) -> torch.Tensor:
    """The sizes of the images of a batch in one tensor, by one copy to the device.

    Args:
        image_sizes: (height, width) of each, as an ``ImageList`` has them: numbers, or tensors
            where the caller is traced.
        device: of the result.

    Returns:
        Tensor: (N, 2) int64 in pixels.
    """
    if any(isinstance(side, torch.Tensor) for size in image_sizes for side in size):
        sizes = [torch.stack([torch.as_tensor(side) for side in size]) for size in image_sizes]
        return torch.stack(sizes).to(device)
    return torch.as_tensor(image_sizes, device=device)


def valid_cells(
    image_sizes: torch.Tensor, map_size: tuple[int, int], stride: int, dtype: torch.dtype
) -> torch.Tensor:
    """Mask of the cells of a feature map that begin inside their image.

    Args:
        image_sizes: (N, 2) (height, width) in pixels.
        map_size: (Hi, Wi).
        stride: pixels per cell.
        dtype: of the result.

    Returns:
        Tensor: (N, 1, Hi, Wi), 1 inside the image, 0 in its padding. Of an image of height h,
        ceil(h / stride) rows are inside.
    """
    rows, columns = (
        torch.arange(size, device=image_sizes.device)[None] * stride < image_sizes[:, dim, None]
        for dim, size in enumerate(map_size)
    )  # (N, Hi), (N, Wi)
    return (rows[:, None, :, None] & columns[:, None, None, :]).to(dtype)


def resize_valid(
    maps: torch.Tensor, valid: torch.Tensor, resized_valid: torch.Tensor
) -> torch.Tensor:
    """Resize maps bilinearly as if each image's map ended where the image ends.

    The zeros of the padding take part in neither direction: each result is divided by the weight
    that fell inside the image, which is the usual clamping at the border of a map.

    Args:
        maps: (N, C, Hi, Wi).
        valid: (N, 1, Hi, Wi) of 0 and 1, the cells of ``maps`` inside the images.
        resized_valid: (N, 1, Hj, Wj), the same for the result.

    Returns:
        Tensor: (N, C, Hj, Wj), zero in the padding.
    """
    size = resized_valid.shape[-2:]

    def resize(x: torch.Tensor) -> torch.Tensor:
        if size[0] >= x.shape[-2]:
            return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        # Shrinking by an integer factor: the mean of the cells, none of them skipped.
        return F.interpolate(x, size=size, mode="area")

    weight = resize(valid)
    return resize(maps * valid) / weight.clamp(min=1e-6) * resized_valid


def extend_edges(
    maps: torch.Tensor, image_sizes: Sequence[tuple[int, int]], stride: int
) -> torch.Tensor:
    """Repeat the last row and column inside each image over its padding.

    RoIAlign interpolates up to half a cell beyond an RoI. At the border of a map it repeats the
    last cell, so an image has the same features alone and in a batch if its padding does that too.
    Sizes may be tensors, where the caller is traced.

    Args:
        maps: (N, C, Hi, Wi).
        image_sizes: (height, width) of the N images, pixels of the network input.
        stride: pixels per cell.

    Returns:
        Tensor: (N, C, Hi, Wi).
    """
    size = maps.shape[-2:]
    if not torch.jit.is_tracing() and all(
        -(-side // stride) >= cells
        for image_size in image_sizes
        for side, cells in zip(image_size, size, strict=True)
    ):
        return maps
    # Of the image's own cells, (N, 2).
    sizes = stack_image_sizes(image_sizes, maps.device)
    last = sizes.sub(1).div(stride, rounding_mode="floor")
    row, column = (
        torch.minimum(torch.arange(cells, device=maps.device), last[:, axis, None])
        for axis, cells in enumerate(size)
    )
    index = (row[:, :, None] * size[1] + column[:, None, :]).flatten(1)
    return maps.flatten(2).gather(2, index[:, None].expand(-1, maps.shape[1], -1)).view_as(maps)
