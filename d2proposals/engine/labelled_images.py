"""Test images with their ground truth, for measures of a network by itself."""

from collections.abc import Iterator
from typing import Any

from detectron2.config import CfgNode
from tqdm import tqdm

from ..data.mapper import ProposalDatasetMapper
from .checked_datasets import records_to_test


def labelled_test_images(cfg: CfgNode, max_images: int = 0) -> Iterator[dict[str, Any]]:
    """The images of ``DATASETS.TEST`` as a training maps them, without flips; shows progress.

    Args:
        cfg: of the job.
        max_images: the first ones only; 0 for all.

    Yields:
        a mapped dictionary for each, with "image" and "instances".

    Raises:
        ValueError: as ``with_checked_datasets``.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.INPUT.RANDOM_FLIP = "none"
    mapper = ProposalDatasetMapper(cfg, is_train=True)
    records = [record for name in cfg.DATASETS.TEST for record in records_to_test(cfg, name)]
    for record in tqdm(records[: max_images or None], disable=None):
        yield mapper(record)
