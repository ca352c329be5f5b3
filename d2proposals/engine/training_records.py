"""What a job does with its datasets, tried before it starts: classes, masks, ids and evaluators.

Detectron2 finds out that a dataset has more classes than its heads, has no masks, or cannot be
evaluated where it meets the first such image or, after the training, begins to evaluate.
"""

import logging
from collections.abc import Iterable
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts

from ..data.category_choice import with_chosen_categories
from ..evaluation.evaluator import unseen_of
from ..evaluation.ground_truth import load_ground_truth
from ..evaluation.recall import check_limits
from .checked_datasets import checked_dataset, own_name, with_checked_datasets, with_copies
from .job import is_two_stage

logger = logging.getLogger(__name__)

# "evaluator_type" of datasets on which detectors are evaluated.
EVALUATOR_TYPES = ("coco", "lvis", "pascal_voc")
# How the names of what is evaluated begin.
_TASKS = ("box_proposals", "mask_proposals", "bbox", "segm", "keypoints")


def with_training_copies(cfg: CfgNode) -> CfgNode:
    """The configuration, naming what a training reads instead of ``DATASETS.TRAIN``.

    Args:
        cfg: of the job.

    Returns:
        a configuration with mended copies where Detectron2 could not read a dataset, and copies
        with the objects of ``DATASETS.CATEGORIES``, which it has no more.

    Raises:
        ValueError: in one line, as :func:`~d2proposals.engine.checked_datasets.checked_dataset`, or
            when a dataset does not have a category of ``DATASETS.CATEGORIES``.
    """
    cfg, categories = with_checked_datasets(cfg, "TRAIN"), cfg.DATASETS.CATEGORIES
    if not categories:
        return cfg
    names = {name: with_chosen_categories(name, categories) for name in cfg.DATASETS.TRAIN}
    cfg = with_copies(cfg, "TRAIN", names).clone()
    cfg.defrost()
    cfg.DATASETS.CATEGORIES = ()
    cfg.freeze()
    return cfg


def training_records(cfg: CfgNode) -> Any:
    """Read the datasets of ``DATASETS.TRAIN`` as Detectron2's training loader does.

    Args:
        cfg: of the job, with the datasets of :func:`with_training_copies`.

    Returns:
        a list of dataset dictionaries, those without objects left out if the configuration says
        so; a ``torch.utils.data.Dataset`` where that is
        what a dataset's function returns.

    Raises:
        ValueError: in one line, when nothing is left, when the datasets of a model that tells
            classes apart have different ones, when objects have classes that the heads lack, or
            when masks are asked for that are not there.
    """
    names = ", ".join(map(own_name, cfg.DATASETS.TRAIN))
    key, number = _classes_of(cfg)
    if not cfg.DATASETS.TRAIN:
        raise ValueError("DATASETS.TRAIN is empty: name a dataset to train on.")
    try:
        records = get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=(
                cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
            ),
            proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
            # What tells no classes apart may train on datasets that have different ones.
            check_consistency=number is not None or len(set(cfg.DATASETS.TRAIN)) == 1,
        )
    except ValueError as error:
        if "different metadata 'thing_classes'" not in str(error):
            raise
        raise ValueError(
            f"DATASETS.TRAIN ({names}) have different classes, which {key} would take for the "
            "same ones: train on datasets that list the same categories in the same order."
        ) from error
    except AssertionError as error:
        if "No valid data found" not in str(error) and "is empty!" not in str(error):
            raise
        raise ValueError(
            f"{names}: no image has an object to train on (crowd regions are none). Check the "
            "annotations and DATASETS.CATEGORIES; images without objects are trained on with "
            "DATALOADER.FILTER_EMPTY_ANNOTATIONS False."
        ) from error
    if isinstance(records, list):
        _check_classes(cfg, records, names)
        _check_masks(cfg, records, names)
    return records


def check_evaluations(cfg: CfgNode, *, trains: bool = True) -> None:
    """Check that ``DATASETS.TEST`` can be evaluated.

    Args:
        cfg: of the job, its datasets checked (:func:`~d2proposals.engine.job.check_datasets`).
        trains: whether the job trains, on ``DATASETS.TRAIN``. In an evaluation alone they need not
            be there, and other classes than theirs are a warning.

    Raises:
        ValueError: in one line, when images have no "image_id", when a detector's dataset has no
            evaluator, fewer classes than the detector, or those of the training in another order;
            where proposals are measured, for wrong limits and for seen categories that split no
            dataset; for expected results that nothing can be compared with.
    """
    _check_expected_results(cfg)
    is_alone = cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork"
    measures_proposals = is_alone or (cfg.TEST.PROPOSALS.OF_DETECTORS and is_two_stage(cfg))
    seen = cfg.TEST.PROPOSALS.SEEN if measures_proposals else ()
    if cfg.DATASETS.TEST and measures_proposals:
        check_limits(cfg.TEST.PROPOSALS.LIMITS)
    for name in cfg.DATASETS.TEST:
        if seen:
            count_difficult = cfg.TEST.PROPOSALS.COUNT_DIFFICULT
            unseen_of(name, load_ground_truth(name, count_difficult=count_difficult), seen)
        metadata = MetadataCatalog.get(name)
        # Detectron2's readers of files give each image its id.
        if not metadata.get("json_file") and not metadata.get("dirname"):
            records = DatasetCatalog.get(name)
            unnamed = sum("image_id" not in record for record in records)
            if unnamed:
                raise ValueError(
                    f"{unnamed} of {len(records)} images of DATASETS.TEST '{name}' have no "
                    "'image_id', which evaluation needs: its function gives each image an own one."
                )
        if is_alone:
            continue
        evaluator_type = metadata.get("evaluator_type", None)
        if evaluator_type not in EVALUATOR_TYPES:
            raise ValueError(
                f"Dataset '{name}' has evaluator_type '{evaluator_type}'; detectors are evaluated "
                "on 'coco', 'lvis' and 'pascal_voc': set it with MetadataCatalog.get("
                f"'{name}').evaluator_type = 'coco', or name a dataset of files in "
                "DATASETS.COCO_FILES."
            )
        # COCO's evaluation stops at a class that the dataset lacks, that of VOC (datasets with
        # a year) does not.
        needs_all = evaluator_type == "coco" and not metadata.get("year")
        _check_classes_of_test(cfg, name, trains, needs_all)


def _check_expected_results(cfg: CfgNode) -> None:
    """Detectron2 compares with them when all the work is done."""
    expected = cfg.TEST.EXPECTED_RESULTS
    if expected and len(cfg.DATASETS.TEST) != 1:
        raise ValueError(
            "TEST.EXPECTED_RESULTS is compared with the results of one dataset, DATASETS.TEST has "
            f"{len(cfg.DATASETS.TEST)}: name one, or leave it empty."
        )
    for entry in expected:
        is_whole = isinstance(entry, list | tuple) and len(entry) == 4
        if not is_whole or not str(entry[0]).startswith(_TASKS):
            raise ValueError(
                "TEST.EXPECTED_RESULTS has entries [task, measure, value, tolerance], with tasks "
                f"that begin with {', '.join(_TASKS)}, e.g. ['box_proposals', 'AR@100', 44.0, "
                f"0.5]; got {entry!r}."
            )


def _check_classes_of_test(cfg: CfgNode, name: str, trains: bool, needs_all: bool) -> None:
    """An evaluation takes a class of the training for the dataset's of the same number."""
    key, number = _classes_of(cfg)
    if number is None:
        return
    # Which reads them, where nobody has yet.
    metadata = MetadataCatalog.get(checked_dataset(cfg, name, "TEST"))
    classes = metadata.get("thing_classes")
    if not classes:
        return
    for trained in cfg.DATASETS.TRAIN:
        trained_on = checked_dataset(cfg, trained, "TRAIN") if trains else trained
        known = MetadataCatalog.get(trained_on).get("thing_classes") or []
        _check_same_classes(trained, known, name, classes, number, trains)
    if needs_all and len(classes) < number:
        raise ValueError(
            f"{key} is {number}, but DATASETS.TEST '{name}' has {len(classes)} classes "
            f"({_name_some(classes)}): set it to {len(classes)}."
        )


def _check_same_classes(
    trained: str, known: list[str], name: str, classes: list[str], number: int, trains: bool
) -> None:
    """Warn of classes that are others than those of the training; where it has the same ones in
    another order, that is an error."""
    pairs = list(zip(known, classes, strict=False))[:number]
    others = [k for k, (first, second) in enumerate(pairs) if first != second]
    if not others:
        return
    k = others[0]
    where = "" if trains else "if the weights are of DATASETS.TRAIN: "
    message = (
        f"{where}class {k} is {known[k]!r} in DATASETS.TRAIN '{trained}' and {classes[k]!r} in "
        f"DATASETS.TEST '{name}' ({len(others)} of {len(classes)} classes differ), and detections "
        "are counted by the number: list the same categories in the same order, with the same ids."
    )
    if trains and sorted(known) == sorted(classes):
        raise ValueError(message)
    logger.warning(message)


def _classes_of(cfg: CfgNode) -> tuple[str, int | None]:
    """The key of the number of classes that a model tells apart, and its value."""
    if cfg.MODEL.META_ARCHITECTURE == "RetinaNet":
        return "MODEL.RETINANET.NUM_CLASSES", cfg.MODEL.RETINANET.NUM_CLASSES
    if is_two_stage(cfg):
        return "MODEL.ROI_HEADS.NUM_CLASSES", cfg.MODEL.ROI_HEADS.NUM_CLASSES
    generator = cfg.MODEL.PROPOSAL_GENERATOR.NAME
    if generator == "DetectorNet" and not cfg.MODEL.DETECTORNET.CLASS_AGNOSTIC:
        return "MODEL.ROI_HEADS.NUM_CLASSES", cfg.MODEL.ROI_HEADS.NUM_CLASSES
    return "", None


def _check_classes(cfg: CfgNode, records: list[dict], names: str) -> None:
    key, number = _classes_of(cfg)
    if number is None:
        return
    highest = max((item.get("category_id", 0) for _, item in _annotations(records)), default=-1)
    if highest >= number:
        classes = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("thing_classes") or []
        what = f"{len(classes)} classes ({_name_some(classes)})" if classes else "more classes"
        raise ValueError(
            f"{key} is {number}, but {names} has {what}, and objects up to class {highest}, "
            f"counted from 0: set it to {max(len(classes), highest + 1)}."
        )


def _check_masks(cfg: CfgNode, records: list[dict], names: str) -> None:
    if not (cfg.MODEL.MASK_ON or cfg.INPUT.USE_INSTANCE_MASK):
        return
    total, without, encoded = 0, [], []
    for record, item in _annotations(records):
        total += 1
        mask = item.get("segmentation")
        # Not by truth alone: a bitmap is an array.
        if mask is None or len(mask) == 0:
            without.append(record)
        elif not isinstance(mask, list) and not item.get("iscrowd"):
            encoded.append(record)
    if without:
        raise ValueError(
            f"{len(without)} of {total} annotations of {names} have no mask ('segmentation'), "
            "which INPUT.USE_INSTANCE_MASK (or MODEL.MASK_ON) asks for, the first in image "
            f"{without[0].get('file_name')}. Take a dataset with masks, or, "
            "where nothing learns from them, set the key to False."
        )
    if encoded and cfg.INPUT.MASK_FORMAT == "polygon":
        raise ValueError(
            f"{len(encoded)} masks of {names} are run-length encoded, but INPUT.MASK_FORMAT is "
            f"'polygon', the first in image {encoded[0].get('file_name')}. Set INPUT.MASK_FORMAT "
            "to 'bitmask'."
        )


def _annotations(records: list[dict]) -> Iterable[tuple[dict, dict]]:
    """Each annotation with its image's dictionary."""
    return ((record, item) for record in records for item in record.get("annotations", ()))


def _name_some(classes: list[str]) -> str:
    return ", ".join(classes[:4]) + (", ..." if len(classes) > 4 else "")
