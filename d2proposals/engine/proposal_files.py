"""Files of precomputed proposals, checked before a job that trains or evaluates on them.

Detectron2 unpickles such a file, code and all, looks each image up, and trains on whatever boxes
there are: a file that lacks an image ends in a ``KeyError``, and one in another convention or scale
in a detector that learns nothing. Here it is read without running any code of it, once, and one
line says what is wrong and how to mend it.

Shape shorthand: R proposals of an image, S of all images.
"""

import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from ..data.dataset_reading import read_dataset
from ..evaluation.box_checks import OUTSIDE_PIXELS
from ..evaluation.ground_truth import GroundTruth
from ..evaluation.proposal_alignment import align_to_dataset
from ..evaluation.proposal_checks import find_faults
from ..files.precomputed_format import ProposalFile, parse_proposals
from ..files.proposal_set import Fault, ProposalSet, name_some
from ..files.safe_pickle import load_pickle, to_plain

logger = logging.getLogger(__name__)

# Faults that Detectron2 survives (it clips boxes, and drops those that are then empty) end the job
# where they concern more than this share of the boxes, else there is a warning.
_TOLERATED_SHARE = 0.05
# Boxes relative to the image's size end at 1.
_LARGEST_RELATIVE = 2
# What ends the job, the most telling first.
_FATAL = ("not-finite", "xywh-boxes", "negative-side", "relative", "outside")
_MEND = {
    "not-finite": "or leave them out: tools/convert_proposals.py --to detectron2 --drop-unusable",
    "xywh-boxes": "or convert it: tools/convert_proposals.py --to detectron2 --box-mode xywh",
    "negative-side": "with corners (x1, y1, x2, y2)",
    "relative": "in pixels of the original image",
    "outside": "in pixels of the original image",
}
# Not worth a word: Detectron2 sorts.
_HARMLESS = ("unsorted-scores",)


class _Listed(NamedTuple):
    """A file of proposals that a configuration names for a dataset."""

    key: str
    path: str
    dataset_name: str


def check_proposal_files(cfg: CfgNode, *, train: bool = True) -> None:
    """Check the keys and files of precomputed proposals, before a job depends on them.

    What looks wrong but does no harm is a warning. Without ``MODEL.LOAD_PROPOSALS`` nothing is
    read. Of several processes the first one reads, and the others wait for what it finds.

    Args:
        cfg: a configuration, its datasets checked
            (:func:`~d2proposals.engine.job.check_datasets`).
        train: check ``DATASETS.PROPOSAL_FILES_TRAIN``, too; False before an evaluation.

    Raises:
        FileNotFoundError: when a file is missing; names it.
        ValueError: when keys contradict each other, when a file cannot be read without running
            code of it, lacks images, or has boxes that are not (R, 4), not finite, or mostly in
            another convention or scale.
    """
    _check_keys(cfg)
    if not cfg.MODEL.LOAD_PROPOSALS:
        return
    all_listed = list(_listed_files(cfg, ("TRAIN", "TEST") if train else ("TEST",)))
    found: Exception | None = None
    if comm.is_main_process():
        try:
            _check_files(all_listed)
        except Exception as error:
            # Raised below, once no process waits any more.
            found = error
    is_wrong = any(comm.all_gather(found is not None))
    if found is not None:
        raise found
    if is_wrong:
        raise ValueError("a file of proposals cannot be used; the first process says why")


def _check_files(all_listed: list[_Listed]) -> None:
    files: dict[str, ProposalFile] = {}
    for listed in all_listed:
        # One file may serve several datasets.
        if listed.path not in files:
            files[listed.path] = _read(listed)
        _check_file(files[listed.path], listed)


def _check_keys(cfg: CfgNode) -> None:
    """
    Raises:
        ValueError: when the keys of precomputed proposals contradict each other.
    """
    is_precomputed = cfg.MODEL.PROPOSAL_GENERATOR.NAME == "PrecomputedProposals"
    if is_precomputed and not cfg.MODEL.LOAD_PROPOSALS:
        raise ValueError(
            "MODEL.PROPOSAL_GENERATOR.NAME 'PrecomputedProposals' needs MODEL.LOAD_PROPOSALS True "
            "and files in DATASETS.PROPOSAL_FILES_TRAIN and DATASETS.PROPOSAL_FILES_TEST "
            "(configs/fast_rcnn_precomputed.yaml)."
        )
    if cfg.MODEL.LOAD_PROPOSALS and not is_precomputed:
        raise ValueError(
            "MODEL.LOAD_PROPOSALS is True, but the detector would use those of its generator "
            f"'{cfg.MODEL.PROPOSAL_GENERATOR.NAME}': set MODEL.PROPOSAL_GENERATOR.NAME to "
            "'PrecomputedProposals', or MODEL.LOAD_PROPOSALS to False."
        )
    if not is_precomputed:
        return
    if cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork":
        raise ValueError(
            "A ProposalNetwork has nothing to do with precomputed proposals: set "
            "MODEL.META_ARCHITECTURE to 'GeneralizedRCNN', or measure the files "
            "(tools/evaluate_proposals.py)."
        )
    if cfg.TEST.AUG.ENABLED:
        raise ValueError(
            "TEST.AUG.ENABLED must be False with MODEL.LOAD_PROPOSALS: Detectron2 has no test-time "
            "augmentation of precomputed proposals."
        )


def _listed_files(cfg: CfgNode, parts: tuple[str, ...]) -> Iterator[_Listed]:
    """The files of the datasets of some parts ("TRAIN", "TEST").

    Raises:
        ValueError: when a part has not as many files as datasets.
    """
    for part in parts:
        names, key = cfg.DATASETS[part], f"DATASETS.PROPOSAL_FILES_{part}"
        paths = cfg.DATASETS[f"PROPOSAL_FILES_{part}"]
        if isinstance(paths, str) or len(paths) != len(names):
            number = "one path" if isinstance(paths, str) else f"{len(paths)} files"
            raise ValueError(
                f"{key} has {number}, but DATASETS.{part} has {len(names)} datasets "
                f"{tuple(names)}: give a tuple with one file per dataset, in the same order. "
                "tools/export_proposals.py writes them and prints this key."
            )
        yield from (_Listed(key, path, name) for path, name in zip(paths, names, strict=True))


def _read(listed: _Listed) -> ProposalFile:
    """Read a file that Detectron2 is going to unpickle.

    Raises:
        FileNotFoundError: when it is missing.
        ValueError: when it is damaged, asks for code, or is not what Detectron2 can use.
    """
    where = f"{listed.key}: {listed.path}"
    try:
        path = PathManager.get_local_path(listed.path)
        content = load_pickle(path)
    except OSError:  # also what a failed download raises
        raise FileNotFoundError(
            f"{where} is missing. Write it with tools/export_proposals.py (--datasets "
            f"{listed.dataset_name}), or name another file."
        ) from None
    except ValueError as error:
        raise ValueError(f"{listed.key}: {error}.") from error
    try:
        file = parse_proposals(content, path)
    except ValueError as error:
        raise ValueError(
            f"{listed.key}: {error}. Other formats become this one by tools/convert_proposals.py "
            f"--to detectron2 --dataset {listed.dataset_name}."
        ) from error
    _check_arrays(content, where)
    # Detectron2 compares ids as text, and takes the last of those that are equal.
    if len(set(map(str, file.image_ids))) < len(file.image_ids):
        raise ValueError(f"{where} lists an image more than once; write it again, each image once.")
    return file


def _check_arrays(content: dict[str, Any], where: str) -> None:
    """Check what Detectron2 does with the arrays as they are stored.

    Args:
        content: of a file that ``parse_proposals`` could read: it takes lists for arrays and any
            numbers for coordinates, which Detectron2 does not.
        where: named in errors.

    Raises:
        ValueError: when boxes or logits are lists, boxes are integers, which a resize would
            truncate, or logits are not (R,).
    """
    logits = content["scores"] if "scores" in content else content["objectness_logits"]
    needed = [
        ("boxes", content["boxes"], 2, "f", "floats (R, 4)"),
        ("objectness logits", logits, 1, "iuf", "numbers (R,)"),
    ]
    for name, items, num_dims, kinds, needs in needed:
        for array in map(to_plain, to_plain(items)):
            is_array = isinstance(array, np.ndarray)
            if is_array and array.ndim == num_dims and array.dtype.kind in kinds:
                continue
            if is_array and not array.size and array.ndim == 1:
                continue
            found = f"{array.dtype} {array.shape}" if is_array else f"a {type(array).__name__}"
            raise ValueError(
                f"{where} has {found} among its {name}; Detectron2 needs arrays of {needs}. Write "
                "it again with tools/convert_proposals.py --to detectron2."
            )


def _check_file(file: ProposalFile, listed: _Listed) -> None:
    """
    Raises:
        ValueError: when a file lacks images of its dataset or its boxes cannot be right.
    """
    images = _read_images(listed.dataset_name)
    where = f"{listed.key}: {listed.path}"
    known = set(map(str, file.image_ids))
    missing = [image_id for image_id in images.image_ids if str(image_id) not in known]
    if missing:
        number = len(images.image_ids)
        hint = " Is it of another dataset or split?" if len(missing) == number else ""
        raise ValueError(
            f"{where} lacks {len(missing)} of {number} images of {listed.dataset_name}: "
            f"{name_some(missing)}.{hint} Each image needs an entry, also without proposals: write "
            f"it with tools/export_proposals.py --datasets {listed.dataset_name}, or "
            f"tools/convert_proposals.py --to detectron2 --dataset {listed.dataset_name}."
        )
    logits = [logits_i.astype(np.float64) for logits_i in file.objectness_logits]
    proposals = ProposalSet(
        "detectron2", file.image_ids, file.boxes, logits, scores_are_logits=True
    )
    aligned, faults = align_to_dataset(proposals, images)
    usable, more_faults = find_faults(aligned, images)
    faults += more_faults
    shares = _shares(file, usable, images)
    fatal = [x for x in faults if shares.get(x.name, x.name in _FATAL) > _TOLERATED_SHARE]
    if fatal:
        worst = min(fatal, key=lambda fault: _FATAL.index(fault.name))
        raise ValueError(f"{where}: {worst.message}. Write it again, {_MEND[worst.name]}.")
    _warn(faults, where)
    number = sum(map(len, file.boxes))
    logger.info(f"{listed.path}: {number} proposals for {listed.dataset_name}")


def _shares(file: ProposalFile, usable: list[np.ndarray], images: GroundTruth) -> dict[str, float]:
    """The shares of boxes that have the faults which matter only if many boxes have them."""
    boxes_of = dict(zip(map(str, file.image_ids), file.boxes, strict=True))
    number, counts = 0, np.zeros(3, np.int64)
    # An image at a time: the boxes of all may be most of the memory.
    for image_id, size, usable_i in zip(images.image_ids, images.image_sizes, usable, strict=True):
        boxes = boxes_of[str(image_id)]  # (R, 4)
        ends = np.array(size or (np.inf, np.inf), np.float32)[::-1] + OUTSIDE_PIXELS  # x and y
        number += len(boxes)
        counts += [
            len(boxes) - np.count_nonzero(usable_i),
            np.count_nonzero((boxes <= _LARGEST_RELATIVE).all(axis=1)),
            np.count_nonzero(
                ((boxes[:, 2:] > ends) | (boxes[:, :2] < -OUTSIDE_PIXELS)).any(axis=1)
            ),
        ]
    if not number:
        return {}
    return dict(zip(("negative-side", "relative", "outside"), counts / number, strict=True))


def _warn(faults: list[Fault], where: str) -> None:
    for fault in faults:
        if fault.name not in _HARMLESS:
            logger.warning(f"{where}: {fault.message}")


def _read_images(dataset_name: str) -> GroundTruth:
    """The images of a dataset; its objects do not matter here and are left out."""
    records = read_dataset(dataset_name).records
    return GroundTruth(
        image_ids=[record["image_id"] for record in records],
        image_sizes=[
            (record["height"], record["width"]) if {"height", "width"} <= record.keys() else None
            for record in records
        ],
        boxes=np.zeros((0, 4), np.float32),
        areas=np.zeros(0, np.float32),
        categories=np.zeros(0, np.int64),
        num_per_image=np.zeros(len(records), np.int64),
        is_annotated=False,
    )
