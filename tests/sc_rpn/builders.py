"""A small SCRPN, and batches for it."""

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_proposal_generator
from detectron2.utils.events import EventStorage

from d2proposals.sc_rpn.locations import PyramidLocations
from tests import common

CHANNELS = 16
SHAPES = {f"p{i}": ShapeSpec(channels=CHANNELS, stride=2**i) for i in range(2, 7)}
STRIDES = [shape.stride for shape in SHAPES.values()]
BOXES = [[10, 10, 60, 80], [30, 40, 46, 52], [70, 5, 120, 120]]


def build_generator(overrides=()):
    cfg = common.make_cfg("sc_rpn_only.yaml", "MODEL.SCRPN.HEAD_CHANNELS", CHANNELS, *overrides)
    torch.manual_seed(0)
    return build_proposal_generator(cfg, SHAPES)


def make_batch(sizes=((128, 160), (100, 90)), boxes=(BOXES, BOXES[:1])):
    images = common.make_images(*sizes)
    generator = torch.Generator().manual_seed(1)
    height, width = images.tensor.shape[-2:]
    features = {
        name: torch.randn(
            len(sizes), CHANNELS, -(-height // s.stride), -(-width // s.stride), generator=generator
        )
        for name, s in SHAPES.items()
    }
    gt = [common.make_instances(size, b) for size, b in zip(sizes, boxes, strict=True)]
    return images, features, gt


def train_step(generator, batch):
    with EventStorage() as storage:
        proposals, losses = generator.train()(*batch)
        sum(losses.values()).backward()
        scalars = {name: history.latest() for name, history in storage.histories().items()}
    return proposals, losses, scalars


def build_locations(*image_sizes, map_sizes=None):
    """Locations of P2-P6; ``map_sizes`` if the maps are not those of the largest image."""
    height, width = (max(size[i] for size in image_sizes) for i in range(2))
    map_sizes = map_sizes or [(-(-height // s), -(-width // s)) for s in STRIDES]
    return PyramidLocations.build(map_sizes, STRIDES, list(image_sizes), torch.device("cpu"))
