"""What several tests need: configurations, images and ground truth made by hand."""

import runpy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BitMasks, Boxes, ImageList, Instances

from d2proposals import add_d2proposals_config

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
# Tests download nothing.
RANDOM = ["MODEL.TORCHVISION.WEIGHTS", ""]
# Small stand-ins for the full-size networks.
TINY = [*RANDOM, "MODEL.BN_INCEPTION.WIDTH_FACTOR", 0.125, "MODEL.RESNETS.DEPTH", 18,
        "MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.RESNETS.NORM", "BN",
        "MODEL.FPN.OUT_CHANNELS", 16, "MODEL.FPN.NORM", "",
        "MODEL.WEIGHTS", "", "MODEL.ROI_BOX_HEAD.FC_DIM", 16,
        "MODEL.ROI_BOX_HEAD.CONV_DIM", 16,
        "MODEL.SPOP.TRUNK.WIDTH_FACTOR", 0.125, "MODEL.SPOP.HEAD_CHANNELS", 16,
        "MODEL.VGG.WIDTH_FACTOR", 0.0625, "MODEL.DEEPMASK.MASK_CHANNELS", 16,
        "MODEL.DEEPMASK.CODE_DIM", 16, "MODEL.DETECTORNET.WIDTH_FACTOR", 0.0625,
        "MODEL.ZIP_DETECTOR.CHANNELS", 32,
        "MODEL.DETECTORNET.SLIDING_WINDOWS.STRIDE", 90.0]  # fmt: skip


@contextmanager
def forgotten_datasets() -> Iterator[list[str]]:
    """A list for names of datasets that are registered here and gone afterwards."""
    names: list[str] = []
    yield names
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def run_tool(name: str, *arguments) -> None:
    """Run the command tools/<name>.py in this process."""
    runpy.run_path(str(ROOT / "tools" / f"{name}.py"))["main"]([str(x) for x in arguments])


def make_cfg(config: str | None = None, *overrides) -> CfgNode:
    """Detectron2's and our defaults, a file below configs/ and KEY VALUE overrides; on the CPU."""
    cfg = get_cfg()
    add_d2proposals_config(cfg)
    if config is not None:
        cfg.merge_from_file(str(CONFIGS / config))
    cfg.MODEL.DEVICE = "cpu"
    cfg.merge_from_list(list(overrides))
    return cfg


def make_images(*sizes: tuple[int, int], divisibility: int = 32, seed: int = 0) -> ImageList:
    """A batch of noise images of the given (height, width), padded as Detectron2 does."""
    generator = torch.Generator().manual_seed(seed)
    images = [torch.randn(3, *size, generator=generator) for size in sizes]
    return ImageList.from_tensors(images, divisibility)


def make_instances(image_size: tuple[int, int], boxes=()) -> Instances:
    """Ground truth of an image: boxes (XYXY), all of class 0."""
    instances = Instances(image_size)
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.zeros(len(instances.gt_boxes), dtype=torch.int64)
    return instances


def add_rectangle_masks(instances: Instances) -> Instances:
    """Give each object its box as its mask; returns the same instances."""
    height, width = instances.image_size
    x1, y1, x2, y2 = (side[:, None] for side in instances.gt_boxes.tensor.unbind(dim=1))
    x, y = torch.arange(width) + 0.5, torch.arange(height) + 0.5
    columns, rows = (x > x1) & (x < x2), (y > y1) & (y < y2)
    instances.gt_masks = BitMasks(rows[:, :, None] & columns[:, None, :])
    return instances


def make_record(size: tuple[int, int], boxes=(), seed: int = 0) -> dict:
    """What a data loader makes of a noise image of (height, width): objects with masks, class 0."""
    pixels = torch.rand(3, *size, generator=torch.Generator().manual_seed(seed)) * 255
    instances = add_rectangle_masks(make_instances(size, boxes))
    return {"image": pixels, "instances": instances, "height": size[0], "width": size[1]}


def precomputed(cfg: CfgNode, height: int, width: int) -> dict:
    """What the mapper adds to an input for a detector on precomputed proposals."""
    if not cfg.MODEL.LOAD_PROPOSALS:
        return {}
    boxes = Boxes(torch.tensor([[5.0, 5, 50, 40], [30, 20, width, height]]))
    logits = torch.tensor([1.0, 0.0])
    instances = Instances((height, width), proposal_boxes=boxes, objectness_logits=logits)
    return {"proposals": instances}


def leaf_keys(node, prefix=""):
    """Full name -> value of every key below a node."""
    keys = {}
    for key, value in node.items():
        if isinstance(value, CfgNode):
            keys |= leaf_keys(value, f"{prefix}{key}.")
        else:
            keys[prefix + key] = value
    return keys


def set_all(node, values):
    """Overrides that give every key of MODEL.<node> a value unlike its default."""
    defaults = leaf_keys(make_cfg().MODEL[node])
    assert set(values) == set(defaults), "give each key a value here, and expect it below"
    same = [key for key, value in values.items() if value == defaults[key]]
    assert same == [], "these are the defaults, which a constructor may have anyway"
    return [x for key, value in values.items() for x in (f"MODEL.{node}.{key}", value)]
