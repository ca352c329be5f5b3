"""Plain-Python twins of the pseudo-code of Algorithms 1 and 2, and random cases for them."""

import math

import torch

from d2proposals.sc_rpn.locations import GroundTruth, PyramidLocations

STRIDES = [4, 8, 16, 32, 64]


def build_locations(image_sizes, padded_size):
    height, width = padded_size
    map_sizes = [(math.ceil(height / s), math.ceil(width / s)) for s in STRIDES]
    return PyramidLocations.build(map_sizes, STRIDES, image_sizes, torch.device("cpu"))


def build_ground_truth(boxes_per_image):
    boxes = [torch.tensor(b, dtype=torch.float32).reshape(-1, 4) for b in boxes_per_image]
    index = [torch.full((len(b),), i) for i, b in enumerate(boxes)]
    return GroundTruth(torch.cat(boxes), torch.cat(index))


def random_boxes(image_size, num_boxes, generator):
    height, width = image_size
    size = torch.tensor([width, height])
    side = 2 ** (torch.rand(num_boxes, 2, generator=generator) * 8 + 1)
    center = torch.rand(num_boxes, 2, generator=generator) * size
    low = torch.minimum((center - side / 2).clamp(min=0), size - 1)
    return torch.cat(
        [low, torch.minimum(torch.maximum(center + side / 2, low + 1), size)], 1
    ).tolist()


# The twins: one object, one sample after the other.


def twin_level(area):
    return min(max(math.floor((math.log2(area) - 9) / 2), 0), 4)


def twin_levels(area, num_levels):
    level = twin_level(area)
    if num_levels == 1:
        return [level]
    if num_levels == 2:
        if not 2**10 <= area < 2**18:
            return [level]
        return [level, level - 1 if area < 2 ** (2 * level + 10) else level + 1]
    exact = (math.log2(area) - 10) / 2
    return sorted(range(5), key=lambda x: (abs(x - exact), -x))[:num_levels]


def twin_cells(locations, image, level):
    """(index, row, column, x, y) of a feature map's cells that are centred in the image."""
    columns, rows = locations.extents[image, level].tolist()
    width, stride = locations.map_sizes[level][1], STRIDES[level]
    for row in range(rows):
        for column in range(columns):
            index = locations.starts[level] + row * width + column
            yield index, row, column, (column + 0.5) * stride, (row + 0.5) * stride


def twin_inside(x, y, box):
    return box[0] < x < box[2] and box[1] < y < box[3]


def twin_iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    inter = max(width, 0) * max(height, 0)
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


def twin_positive_region(locations, ground_truth, sigma, region="touched"):
    """The centre region's cells: those that share an area with it, or else the centre's cell.

    "inside": those whose centre is in it.
    """
    best = {}
    for g, (box, image) in enumerate(
        zip(ground_truth.boxes.tolist(), ground_truth.image_index.tolist(), strict=True)
    ):
        width, height = box[2] - box[0], box[3] - box[1]
        x, y = box[0] + width / 2, box[1] + height / 2
        level = twin_level(width * height)
        cells = list(twin_cells(locations, image, level))

        def overlap(cell, center, length, side=STRIDES[level]):
            half = length * sigma / 2
            return min(cell + side / 2, center + half) - max(cell - side / 2, center - half)

        # The cell around the centre, of those centred in the image; at a border the later one.
        center = min(cells, key=lambda c: (abs(c[3] - x), -c[3], abs(c[4] - y), -c[4]))[0]
        for index, _, _, cell_x, cell_y in cells:
            in_region = overlap(cell_x, x, width) > 0 and overlap(cell_y, y, height) > 0
            is_positive = index == center or (in_region and twin_inside(cell_x, cell_y, box))
            if region == "inside":
                is_positive = (
                    abs(cell_x - x) < width * sigma / 2 and abs(cell_y - y) < height * sigma / 2
                )
            if is_positive:
                key = (image, index)
                best[key] = min(best.get(key, (math.inf, 0)), (width * height, g))
    return {key: g for key, (_, g) in best.items()}


def twin_size_aware_threshold(locations, ground_truth, init_boxes, k, num_levels, keep_best=False):
    best = {}
    proposals = init_boxes.tolist()
    for g, (box, image) in enumerate(
        zip(ground_truth.boxes.tolist(), ground_truth.image_index.tolist(), strict=True)
    ):
        area = (box[2] - box[0]) * (box[3] - box[1])
        x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        candidates = []
        for level in twin_levels(area, num_levels):
            samples = []
            for index, *_ in twin_cells(locations, image, level):
                d = proposals[image][index]
                d_x, d_y = (d[0] + d[2]) / 2, (d[1] + d[3]) / 2
                samples.append(((d_x - x) ** 2 + (d_y - y) ** 2, index, d_x, d_y))
            candidates += sorted(samples)[:k]
        ious = [twin_iou(proposals[image][c[1]], box) for c in candidates]
        mean = sum(ious) / len(ious)
        chosen = [
            (iou, index)
            for (_, index, d_x, d_y), iou in zip(candidates, ious, strict=True)
            if iou > mean and twin_inside(d_x, d_y, box)
        ]
        if keep_best and not chosen and max(ious) > 0:
            first = ious.index(max(ious))
            chosen = [(ious[first], candidates[first][1])]
        for iou, index in chosen:
            key = (image, index)
            best[key] = max(best.get(key, (-1, 0)), (iou, -g))
    return {key: -g for key, (_, g) in best.items()}


def positives(assignment):
    found = {
        tuple(i): assignment.matched[tuple(i)].item()
        for i in (assignment.labels == 1).nonzero().tolist()
    }
    assert (assignment.matched[assignment.labels != 1] == -1).all()
    return found


def random_case(seed, image_sizes=((256, 320), (190, 333)), num_boxes=(12, 7), k_noise=6.0):
    generator = torch.Generator().manual_seed(seed)
    boxes = [
        random_boxes(size, n, generator) for size, n in zip(image_sizes, num_boxes, strict=True)
    ]
    padded = [max(s[i] for s in image_sizes) // 32 * 32 + 32 for i in range(2)]
    locations = build_locations(image_sizes, padded)
    side = locations.stride_of_location[:, None] * 4
    boxes_on_grid = torch.cat([locations.centers - side, locations.centers + side], dim=1)
    noise = torch.randn(len(image_sizes), *boxes_on_grid.shape, generator=generator)
    init_boxes = boxes_on_grid + noise * k_noise
    low, high = init_boxes[..., :2], init_boxes[..., 2:]
    return (
        locations,
        build_ground_truth(boxes),
        torch.cat([torch.minimum(low, high), torch.maximum(low, high)], -1),
    )
