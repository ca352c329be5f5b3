"""A file of boosted trees, for configurations that name one."""

from pathlib import Path

import numpy as np

from d2proposals.zip_rpn.boosting import save_boosted_trees


def write_boosting_file(path: Path, *, channels: int, num_classes: int = 20) -> None:
    """A tree for each class and one that splits, in the format of tools/boost_detector.py.

    Args:
        path: to write.
        channels: MODEL.ZIP_DETECTOR.CHANNELS of the model that reads it.
        num_classes: of the detector.
    """
    leaf = np.stack([np.arange(num_classes)] * 3, axis=1)
    nodes = np.broadcast_to(np.arange(3), leaf.shape)
    arrays = {
        "feature": np.zeros_like(leaf), "threshold": np.zeros(leaf.shape, np.float32),
        "left": nodes, "right": nodes, "leaf_class": leaf, "weights": np.ones(num_classes),
        # Six blocks of res4, and three of res5 with twice the channels.
        "num_features": np.array(6 * channels + 3 * 2 * channels),
        "num_classes": np.array(num_classes),
    }  # fmt: skip
    save_boosted_trees(path, arrays)
