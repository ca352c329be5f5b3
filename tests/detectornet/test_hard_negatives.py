"""Hard negatives: the rule by hand, two rounds, and training on them with their configuration."""

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, BoxMode, Instances, pairwise_iou
from detectron2.utils.events import EventStorage

from d2proposals.detectornet.hard_negatives import hard_negatives, merge_rounds
from d2proposals.files.precomputed_format import read_proposal_file
from tests.common import CONFIGS, make_cfg, make_instances, run_tool
from tests.engine.tiny_coco import registered, write_tiny_coco

TINY = ["MODEL.DETECTORNET.WIDTH_FACTOR", "0.01", "MODEL.DETECTORNET.NORM", "GN",
        "MODEL.DETECTORNET.SLIDING_WINDOWS.STRIDE", "60.0", "MODEL.DETECTORNET.INPUT_SIZE", "97",
        "MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", "0"]  # fmt: skip


def detections(*boxes_and_scores):
    boxes = torch.tensor([x[:4] for x in boxes_and_scores], dtype=torch.float32).reshape(-1, 4)
    found = Instances((100, 100), pred_boxes=Boxes(boxes))
    found.scores = torch.tensor([x[4] for x in boxes_and_scores], dtype=torch.float32)
    return found


def record(objects=(), crowd=()):
    annotations = [
        {"bbox": list(box), "bbox_mode": BoxMode.XYXY_ABS, "iscrowd": is_crowd}
        for boxes, is_crowd in ((objects, 0), (crowd, 1))
        for box in boxes
    ]
    return {"annotations": annotations}


FOUND = detections(
    (0, 0, 20, 20, 0.9),  # an object
    (0, 0, 100, 100, 0.5),  # covers it, with an IoU of .04
    (0, 10, 20, 30, 0.8),  # an IoU of 1/3 with it
    (60, 60, 80, 80, 0.7),  # nothing
    (30, 60, 50, 80, 0.95),  # nothing
)


def test_what_is_no_object_by_hand():
    boxes, scores = hard_negatives(FOUND, record([[0, 0, 20, 20]]), 0.2, 10)
    assert boxes.tolist() == [[30, 60, 50, 80], [60, 60, 80, 80], [0, 0, 100, 100]]
    assert scores.tolist() == pytest.approx([0.95, 0.7, 0.5])
    boxes, _ = hard_negatives(FOUND, record([[0, 0, 20, 20]]), 0.34, 2)
    assert boxes.tolist() == [[30, 60, 50, 80], [0, 10, 20, 30]]
    # What touches a crowd may be in it.
    boxes, _ = hard_negatives(FOUND, record([[0, 0, 20, 20]], [[70, 70, 99, 99]]), 0.2, 10)
    assert boxes.tolist() == [[30, 60, 50, 80]]
    assert len(hard_negatives(FOUND, record(), 0.2, 10)[0]) == 5
    boxes, scores = hard_negatives(detections(), record([[0, 0, 5, 5]]), 0.2, 10)
    assert boxes.shape == (0, 4) and scores.shape == (0,)


def test_two_rounds_as_one():
    first = (np.float32([[0, 0, 9, 9], [1, 1, 5, 5]]), np.float32([0.9, 0.2]))
    second = (np.float32([[2, 2, 8, 8], [0, 0, 9, 9]]), np.float32([0.5, 0.3]))
    boxes, scores = merge_rounds(first, second)
    assert boxes.tolist() == [[0, 0, 9, 9], [2, 2, 8, 8], [1, 1, 5, 5]]
    assert scores.tolist() == pytest.approx([0.9, 0.5, 0.2])
    none = np.zeros((0, 4), np.float32), np.zeros(0, np.float32)
    assert [len(x) for x in merge_rounds(none, none)] == [0, 0]


def test_mining_and_training_on_what_was_mined(tmp_path, capsys):
    torch.manual_seed(0)
    config = str(CONFIGS / "detectornet_sliding_windows_voc.yaml")
    # Untrained: with a threshold of 0, every class that beats the background is a detection.
    options = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "MODEL.ROI_HEADS.NUM_CLASSES", "80",
               "DATASETS.TRAIN", "('tiny_train',)", *TINY]  # fmt: skip
    rounds = [tmp_path / "round_1.pkl", tmp_path / "round_2.pkl"]
    with registered(write_tiny_coco(tmp_path / "datasets") / "coco"):
        run_tool("mine_hard_negatives", "--config-file", config, "--output", rounds[0],
                 "--top", "3", *options)  # fmt: skip
        run_tool("mine_hard_negatives", "--config-file", config, "--output", rounds[1],
                 "--top", "3", "--add", rounds[0], "SEED", "2", *options)  # fmt: skip
    first, second = (read_proposal_file(x) for x in rounds)
    assert "hard negatives of 4 images of tiny_train" in capsys.readouterr().out
    assert first.image_ids == second.image_ids == [1, 2, 3, 4]
    assert [len(x) for x in first.boxes] == [3] * 4
    for before, after in zip(first.boxes, second.boxes, strict=True):
        assert 3 <= len(after) <= 6 and all(x in after.tolist() for x in before.tolist())


def test_mining_is_of_one_dataset_and_of_the_categories_trained_on(
    tmp_path, capsys, caplog, monkeypatch
):
    config = str(CONFIGS / "detectornet_sliding_windows_voc.yaml")
    command = ["mine_hard_negatives", "--config-file", config, "--output", tmp_path / "x.pkl"]
    for names in ("()", "('tiny_train','tiny_val')"):
        with pytest.raises(SystemExit):
            run_tool(*command, "DATASETS.TRAIN", names, *TINY)
        assert "are of one dataset, DATASETS.TRAIN has" in capsys.readouterr().err
    seen = []

    def negatives(detections, record, max_iou, number):
        seen.append(len(record["annotations"]))
        return np.zeros((0, 4), np.float32), np.zeros(0, np.float32)

    monkeypatch.setattr("d2proposals.detectornet.hard_negatives.hard_negatives", negatives)
    options = ["DATASETS.TRAIN", "('tiny_train',)", "DATASETS.CATEGORIES", "('dog',)",
               "MODEL.ROI_HEADS.NUM_CLASSES", "80", *TINY]  # fmt: skip
    with registered(write_tiny_coco(tmp_path / "datasets") / "coco"):
        run_tool(*command, *options)
    assert "no hard negative among the detections on tiny_train" in caplog.text
    assert "0 hard negatives of 4 images" in capsys.readouterr().out
    # Where nothing is a dog, as in the training.
    assert seen == [0, 0, 0, 0]


def test_hard_negatives_train_the_classifier():
    torch.manual_seed(0)
    model = build_model(make_cfg("detectornet_hard_negatives_voc.yaml", *TINY)).train()
    mined = Boxes(torch.tensor([[70.0, 5, 100, 35], [65, 60, 120, 90], [12, 12, 60, 60]]))
    target = make_instances((96, 128), [[10, 10, 60, 60]])
    proposals = Instances((96, 128), proposal_boxes=mined, objectness_logits=torch.zeros(3))
    batch = {"image": torch.zeros(3, 96, 128), "instances": target, "proposals": proposals}
    seen, classify = [], model.roi_heads._classify
    model.roi_heads._classify = lambda *args: seen.append(args[1]) or classify(*args)
    with EventStorage():
        (loss,) = model([batch]).values()
    loss.backward()
    # 13 positives, then 19 negatives; of these the two mined ones that are none of the object.
    negatives = seen[0][13:]
    assert len(seen[0]) == 32
    assert all((negatives == box).all(dim=1).any() for box in mined.tensor[:2])
    assert pairwise_iou(Boxes(negatives), target.gt_boxes).max() < 0.2


def test_the_tool_wants_a_detector(capsys):
    with pytest.raises(SystemExit):
        run_tool("mine_hard_negatives", "--config-file",
                 CONFIGS / "shapes" / "detectornet_rpn_only.yaml", "--output", "x.pkl")  # fmt: skip
    assert "MODEL.META_ARCHITECTURE GeneralizedRCNN" in capsys.readouterr().err
