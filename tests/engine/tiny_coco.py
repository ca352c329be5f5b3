"""A COCO dataset of a few small images, and a job that runs on it in seconds."""

import json
import logging
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from PIL import Image
from torch import nn

CONFIG = str(Path(__file__).resolve().parents[2] / "configs" / "shapes" / "rpn_only.yaml")
# Overrides for 64-pixel images.
SMALL = [
    *("MODEL.DEVICE", "cpu", "MODEL.BACKBONE.NAME", "TinyPyramid"),
    *(
        "INPUT.MIN_SIZE_TRAIN",
        "(64,)",
        "INPUT.MIN_SIZE_TEST",
        "64",
        "TEST.AUG.MIN_SIZES",
        "(64,96)",
    ),
    *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "()"),
    *("SOLVER.WARMUP_ITERS", "0", "TEST.PROPOSALS.LIMITS", "(10, 100)"),
]


@BACKBONE_REGISTRY.register()
class TinyPyramid(Backbone):
    """Maps "p2" to "p6" of 8 channels, each half as large as the one before."""

    def __init__(self, cfg, input_shape):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=4, padding=1)
        self.levels = nn.ModuleList(nn.Conv2d(8, 8, 3, stride=2, padding=1) for _ in range(4))

    def forward(self, x):
        maps = [self.stem(x).relu()]
        for level in self.levels:
            maps.append(level(maps[-1]).relu())
        return {f"p{i + 2}": x for i, x in enumerate(maps)}

    def output_shape(self):
        return {f"p{i}": ShapeSpec(channels=8, stride=2**i) for i in range(2, 7)}

    @property
    def size_divisibility(self):
        return 64


def write_tiny_coco(root: Path, num_images: int = 4) -> Path:
    """Write ``root``/coco as Detectron2 expects COCO 2017, its two splits alike.

    Each image has two squares with polygon masks and, every other image, a crowd region.
    """
    rng = np.random.default_rng(0)
    for split in ("train2017", "val2017"):
        (root / "coco" / split).mkdir(parents=True)
        images, annotations = [], []
        for image_id in range(1, num_images + 1):
            pixels = rng.integers(0, 80, (64, 80, 3), dtype=np.uint8)
            for k in range(2):
                x, y, side = 6 + 36 * k, int(rng.integers(5, 25)), int(rng.integers(16, 30))
                pixels[y : y + side, x : x + side] = 200
                polygon = [x, y, x + side, y, x + side, y + side, x, y + side]
                annotations.append(
                    {
                        **{"id": len(annotations) + 1, "image_id": image_id, "category_id": 1},
                        **{"bbox": [x, y, side, side], "area": side * side, "iscrowd": 0},
                        "segmentation": [polygon],
                    }
                )
            if image_id % 2 == 0:
                counts = [0, 640, 64 * 80 - 640]  # the 10 leftmost columns
                annotations.append(
                    {
                        **{"id": len(annotations) + 1, "image_id": image_id, "category_id": 1},
                        **{"bbox": [0, 0, 10, 64], "area": 640, "iscrowd": 1},
                        "segmentation": {"size": [64, 80], "counts": counts},
                    }
                )
            name = f"{image_id:012d}.jpg"
            Image.fromarray(pixels).save(root / "coco" / split / name)
            images.append({"id": image_id, "file_name": name, "height": 64, "width": 80})
        (root / "coco" / "annotations").mkdir(exist_ok=True)
        # All 80, which Detectron2 expects of a dataset called COCO.
        things = [x for x in COCO_CATEGORIES if x["isthing"]]
        categories = [{"id": x["id"], "name": x["name"]} for x in things]
        content = {"images": images, "annotations": annotations, "categories": categories}
        file = root / "coco" / "annotations" / f"instances_{split}.json"
        file.write_text(json.dumps(content), encoding="utf-8")
    return root


def make_args(*opts, eval_only=False, resume=False, config_file=CONFIG) -> Namespace:
    """What Detectron2's argument parser would return."""
    return Namespace(
        config_file=config_file,
        opts=[*SMALL, *(str(x) for x in opts)],
        eval_only=eval_only,
        resume=resume,
        num_gpus=1,
        num_machines=1,
        machine_rank=0,
        dist_url="auto",
    )


@contextmanager
def registered(coco: Path) -> Iterator[None]:
    """Register what :func:`write_tiny_coco` wrote as "tiny_train" and "tiny_val" for a while."""
    names = {"tiny_train": "train2017", "tiny_val": "val2017"}
    for name, split in names.items():
        json_file = coco / "annotations" / f"instances_{split}.json"
        register_coco_instances(name, {}, str(json_file), str(coco / split))
    try:
        yield
    finally:
        for name in names:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


@contextmanager
def loggers_as_before() -> Iterator[None]:
    """Undo Detectron2's ``setup_logger``, which cuts off loggers that other tests listen to."""
    loggers = [logging.getLogger(x) for x in ("d2proposals", "detectron2", "fvcore")]
    before = [(x, x.propagate, list(x.handlers), x.level) for x in loggers]
    try:
        yield
    finally:
        for logger, propagate, handlers, level in before:
            logger.propagate, logger.handlers = propagate, handlers
            logger.setLevel(level)
