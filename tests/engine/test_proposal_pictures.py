"""Tests of the pictures of covered and missed objects for TensorBoard."""

import io

import numpy as np
import pytest
import torch
from detectron2.utils.env import seed_all_rng
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import IMAGES, EventAccumulator

from d2proposals.engine import Trainer
from d2proposals.engine.proposal_pictures import can_show_proposals
from tests.common import make_cfg
from tests.engine.tiny_coco import SMALL

DATASETS = ("DATASETS.TRAIN", ("tiny_train",), "DATASETS.TEST", ("tiny_val",))


def train(output, config, *overrides):
    cfg = make_cfg(config, *SMALL, *DATASETS, "OUTPUT_DIR", str(output), "SOLVER.MAX_ITER", 4)
    cfg.merge_from_list(["TEST.EVAL_PERIOD", 0, "DATALOADER.NUM_WORKERS", 0, *overrides])
    seed_all_rng(1)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    return trainer


def read_pictures(output):
    events = EventAccumulator(str(output), size_guidance={IMAGES: 0}).Reload()
    return {tag: events.Images(tag) for tag in events.Tags()["images"]}


@pytest.mark.parametrize("config", ["shapes/rpn_only.yaml", "shapes/faster_rcnn_rpn.yaml"])
def test_pictures_of_the_same_images_every_period(tiny_coco, tmp_path, config):
    trainer = train(tmp_path, config, "VIS_PERIOD", 2)
    pictures = read_pictures(tmp_path)
    ours = {tag: images for tag, images in pictures.items() if tag.startswith("proposals/")}
    assert sorted(ours) == [f"proposals/{image_id}" for image_id in (1, 2, 3, 4)]
    for images in ours.values():
        # Counted from 0, as Detectron2 counts.
        assert [image.step for image in images] == [1, 3]
    pixels = np.array(Image.open(io.BytesIO(ours["proposals/1"][0].encoded_image_string)), int)
    assert pixels.shape == (576, 720, 3)
    # The two squares of each image are covered, blue, or missed, orange.
    is_drawn = [(np.abs(pixels - colour) < 12).all(axis=2).sum() > 100
                for colour in ([0x56, 0xB4, 0xE9], [0xD5, 0x5E, 0x00])]  # fmt: skip
    assert any(is_drawn)
    assert trainer.model.training


def test_pictures_leave_the_training_as_it_is(tiny_coco, tmp_path):
    weights = [
        train(tmp_path / str(period), "shapes/rpn_only.yaml", "VIS_PERIOD", period).model
        for period in (0, 1)
    ]
    for one, other in zip(*(model.state_dict().values() for model in weights), strict=True):
        assert torch.equal(one, other)
    assert read_pictures(tmp_path / "0") == {}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), True),
        (("VIS_PERIOD", 0), False),
        (("DATASETS.TEST", ()), False),
        (("MODEL.LOAD_PROPOSALS", True), False),
        (("MODEL.META_ARCHITECTURE", "RetinaNet"), False),
    ],
)
def test_jobs_that_have_nothing_to_show(overrides, expected):
    cfg = make_cfg("shapes/rpn_only.yaml", "VIS_PERIOD", 5, *overrides)
    assert can_show_proposals(cfg) == expected
