"""Each generator learns: it overfits eight images of the embedded dataset."""

import itertools

import cv2
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import inference_on_dataset
from detectron2.modeling import build_model
from detectron2.structures import BoxMode
from detectron2.utils.events import EventStorage
from pycocotools import mask as mask_util

from d2proposals.data.mapper import ProposalDatasetMapper
from d2proposals.data.shapes_rendering import render_image
from d2proposals.engine import Trainer
from d2proposals.evaluation import ProposalEvaluator
from d2proposals.evaluation.fixed_grid import evaluate_fixed_grid
from tests.common import make_cfg

NAME = "eight_images"
MIN_SIDE = 24  # pixels


@pytest.fixture(scope="module")
def eight_images(tmp_path_factory):
    """Register eight images whose objects all have sides of at least 24 pixels."""
    folder = tmp_path_factory.mktemp(NAME)
    dicts = []
    for index in itertools.count():
        image, annotations = render_image(2, index)
        sides = [min(x["bbox"][2:]) for x in annotations]
        if not 1 <= len(sides) <= 8 or min(sides) < MIN_SIDE:
            continue
        file_name = str(folder / f"{index}.png")
        assert cv2.imwrite(file_name, image)
        for x in annotations:
            x.update(bbox_mode=BoxMode.XYWH_ABS, category_id=0)
            if isinstance(x["segmentation"], dict):  # Detectron2 wants encodings compressed
                x["segmentation"] = mask_util.frPyObjects(x["segmentation"], *image.shape[:2])
        height, width = image.shape[:2]
        dicts.append(
            {"file_name": file_name, "image_id": index, "height": height, "width": width,
             "annotations": annotations}
        )  # fmt: skip
        if len(dicts) == 8:
            break
    DatasetCatalog.register(NAME, lambda: dicts)
    MetadataCatalog.get(NAME).thing_classes = ["object"]
    yield NAME
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def evaluate(cfg, model, task: str = "box_proposals") -> float:
    """AR@100 in percent."""
    evaluator = ProposalEvaluator(NAME, distributed=False)
    results = inference_on_dataset(model, Trainer.build_test_loader(cfg, NAME), evaluator)
    model.train()
    return results[task]["AR@100"]


def overfit(
    cfg, *, iterations: int, learning_rate: float, task: str = "box_proposals"
) -> tuple[float, float]:
    """Train on four of the eight images at a time; AR@100 before and after."""
    torch.manual_seed(0)
    model = build_model(cfg).train()
    untrained = evaluate(cfg, model, task)
    mapper = ProposalDatasetMapper(cfg, True)
    batch = [mapper(x) for x in DatasetCatalog.get(NAME)]
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, iterations)
    with EventStorage():
        for i in range(iterations):
            optimizer.zero_grad()
            sum(model(batch[i % 2 :: 2]).values()).backward()
            optimizer.step()
            schedule.step()
    return untrained, evaluate(cfg, model, task)


def check_learnt(untrained: float, trained: float) -> None:
    """AR@100 is 20 points above that of random weights, and of a fixed grid of boxes."""
    grid = evaluate_fixed_grid(NAME, distributed=False)["box_proposals"]["AR@100"]
    print(f"AR@100: untrained {untrained:.1f}, grid {grid:.1f}, trained {trained:.1f}")
    assert trained > max(untrained, grid) + 20


# Three quarters of the usual size.
SMALL = ["DATASETS.TEST", (NAME,), "INPUT.RANDOM_FLIP", "none",
         "INPUT.MIN_SIZE_TRAIN", (192,), "INPUT.MAX_SIZE_TRAIN", 288,
         "INPUT.MIN_SIZE_TEST", 192, "INPUT.MAX_SIZE_TEST", 288]  # fmt: skip
ZIP = [*SMALL, "INPUT.DY_TRAIN_SCALE.ENABLED", False, "MODEL.BN_INCEPTION.WIDTH_FACTOR", 0.125]
# What configs/shapes/zip_rpn_only.yaml sets beside the paper.
PAPER = ["MODEL.ZIP.LOW_QUALITY_MATCH", False, "MODEL.ZIP.LEVEL_NMS_THRESH", 0.5,
         "MODEL.ZIP.BBOX_REG_LOSS_TYPE", "squared_l2",
         "MODEL.ZIP.BBOX_REG_LOSS_WEIGHT", 1.0,
         "MODEL.ZIP.MULTI_NMS_THRESHOLDS", (0.9, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5),
         "MODEL.ZIP.MULTI_NMS_TOPKS", (3000, 2000, 1000, 800, 400, 200, 100, 50)]  # fmt: skip


@pytest.mark.slow
def test_zip_overfits_eight_images(eight_images):
    cfg = make_cfg("shapes/zip_rpn_only.yaml", *ZIP)
    untrained, trained = overfit(cfg, iterations=120, learning_rate=2e-3)
    check_learnt(untrained, trained)
    assert trained >= 70


@pytest.mark.slow
def test_zip_with_the_paper_s_settings_learns_too(eight_images):
    cfg = make_cfg("shapes/zip_rpn_only.yaml", *ZIP, *PAPER)
    untrained, trained = overfit(cfg, iterations=120, learning_rate=2e-3)
    print(f"AR@100: untrained {untrained:.1f}, trained {trained:.1f}")
    assert trained > untrained + 20


SC_RPN = [*SMALL, "MODEL.FPN.OUT_CHANNELS", 32, "MODEL.SCRPN.HEAD_CHANNELS", 32]


@pytest.mark.slow
def test_sc_rpn_overfits_eight_images(eight_images):
    cfg = make_cfg("shapes/sc_rpn_only.yaml", *SC_RPN)
    untrained, trained = overfit(cfg, iterations=50, learning_rate=2e-3)
    check_learnt(untrained, trained)


# No object is smaller than 24 pixels, which scale 2 makes 48.
DEEPMASK = ["DATASETS.TEST", (NAME,), "MODEL.DEEPMASK.LOG2_SCALES", (-1.0, -0.5, 0.0, 0.5, 1.0)]


@pytest.mark.slow
def test_deepmask_overfits_eight_images(eight_images):
    cfg = make_cfg("shapes/deepmask_rpn_only.yaml", *DEEPMASK)
    untrained, trained = overfit(cfg, iterations=110, learning_rate=2e-3, task="mask_proposals")
    print(f"mask AR@100: untrained {untrained:.1f}, trained {trained:.1f}")
    assert trained > untrained + 25


SPOP = ["DATASETS.TEST", (NAME,), "INPUT.RANDOM_FLIP", "none"]


@pytest.mark.slow
def test_spop_overfits_eight_images(eight_images):
    cfg = make_cfg("shapes/spop_rpn_only.yaml", *SPOP)
    untrained, trained = overfit(cfg, iterations=120, learning_rate=1e-3)
    check_learnt(untrained, trained)


DETECTORNET = ["DATASETS.TEST", (NAME,), "INPUT.RANDOM_FLIP", "none",
               "MODEL.DETECTORNET.WIDTH_FACTOR", 0.125]  # fmt: skip


@pytest.mark.slow
def test_detectornet_overfits_eight_images(eight_images):
    cfg = make_cfg("shapes/detectornet_rpn_only.yaml", *DETECTORNET)
    untrained, trained = overfit(cfg, iterations=150, learning_rate=1e-3)
    check_learnt(untrained, trained)
