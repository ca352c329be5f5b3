"""Files of proposals for the tiny COCO dataset, right and wrong."""

import pickle

import numpy as np
from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode

NUM_PROPOSALS = 40


def proposals_of(dataset_name, num_random=NUM_PROPOSALS - 2):
    """Content of a file in Detectron2's format: an image's objects first, then random boxes."""
    rng = np.random.default_rng(0)
    ids, boxes, logits = [], [], []
    for record in DatasetCatalog.get(dataset_name):
        objects = [
            BoxMode.convert(x["bbox"], x["bbox_mode"], BoxMode.XYXY_ABS)
            for x in record["annotations"]
            if not x["iscrowd"]
        ]
        corners = rng.uniform(0, (record["width"], record["height"]), (num_random, 2, 2))
        corners = np.sort(corners, axis=1).reshape(-1, 4)
        ids.append(record["image_id"])
        boxes.append(np.concatenate([np.reshape(objects, (-1, 4)), corners]).astype(np.float32))
        logits.append(np.linspace(5, -5, len(boxes[-1]), dtype=np.float32))
    mode = BoxMode.XYXY_ABS.value
    return {"ids": ids, "boxes": boxes, "objectness_logits": logits, "bbox_mode": mode}


def write_pickle(path, content):
    path.write_bytes(pickle.dumps(content, protocol=4))
    return path


def override_files(train, test):
    """KEY VALUE overrides."""
    parts = {"TRAIN": ("tiny_train", train), "TEST": ("tiny_val", test)}
    return [
        x
        for part, (name, path) in parts.items()
        for x in (
            *(f"DATASETS.{part}", f"('{name}',)"),
            *(f"DATASETS.PROPOSAL_FILES_{part}", f"('{path}',)"),
        )
    ]
