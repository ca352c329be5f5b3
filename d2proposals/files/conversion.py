"""Files of proposals in any known format: recognised, read and written.

* ``detectron2``: Detectron2's precomputed proposals, a pickle with logits and without masks.
* ``coco``: COCO's results, JSON with boxes (XYWH), masks or both, and scores.
* ``mmdet3``: mmdetection 3's dumped proposals, a pickle from file names to boxes and scores.
* ``mmdet2``: mmdetection 2's, a pickle of (R, 5) arrays in the order of the dataset's
  annotation file.
* ``sam``: Segment-Anything's automatic masks, a folder with a JSON file per image.
* ``d2proposals``: this project's own JSON, with boxes, logits and masks.

A format is recognised by its content, never by its name. Pickles are read without running them.

Shape shorthand: R proposals of an image.
"""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from .automatic_masks import write_sam
from .coco_results import write_coco
from .json_formats import read_json, read_json_folder
from .opened_files import open_content
from .own_format import write_own
from .pickle_formats import read_pickle, write_detectron2, write_mmdet2, write_mmdet3
from .proposal_set import DatasetImages, Fault, ProposalSet, name_some

_WRITERS: dict[str, Callable[[Path, ProposalSet, DatasetImages | None], None]] = {
    "detectron2": write_detectron2,
    "coco": write_coco,
    "mmdet3": write_mmdet3,
    "mmdet2": write_mmdet2,
    "sam": write_sam,
    "d2proposals": write_own,
}
FORMATS = tuple(_WRITERS)


def read_proposals(path: str | os.PathLike, images: DatasetImages | None = None) -> ProposalSet:
    """Read a file, or Segment-Anything's folder, of proposals in any known format.

    Args:
        path: of the file or folder.
        images: the dataset's images, for formats that have no ids of their own.

    Returns:
        The proposals as they stand in the file, with what can be told to be wrong without the
        dataset in ``faults``. Scores are not sorted.

    Raises:
        FileNotFoundError: if there is nothing of that name.
        ValueError: in one line, if the format is unknown or the content damaged.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        proposals = read_json_folder(path, images)
    else:
        with open_content(path) as file:
            head = file.read(4096)
            file.seek(0)
            # No pickle begins with a brace or a bracket of JSON.
            is_json = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"[", b"{")
            read = read_json if is_json else read_pickle
            proposals = read(file, path, images)
    if images is not None:
        _find_images(proposals, images)
    return proposals


def _find_images(proposals: ProposalSet, images: DatasetImages) -> None:
    """Give proposals the dataset's own ids, in place, where theirs mean an image of it."""
    proposals.image_ids, ambiguous = images.resolve(proposals.image_ids)
    if ambiguous:
        proposals.faults.append(
            Fault(
                "ambiguous-images",
                f"{len(ambiguous)} ids could each mean several images of the dataset, by number or "
                f"by file name, and are left out; write its own ids. Ids: {name_some(ambiguous)}",
            )
        )


def write_proposals(
    path: str | os.PathLike,
    proposals: ProposalSet,
    format_name: str,
    images: DatasetImages | None = None,
) -> None:
    """Write proposals in a known format, atomically (a folder: each of its files).

    Args:
        path: of the file, for "sam" of the folder.
        proposals: boxes without masks may go to any format but "sam"; masks are left out of
            formats that have none.
        format_name: one of ``FORMATS``.
        images: the dataset's images: mmdetection's formats need them, for order or file names.

    Raises:
        ValueError: if the format cannot hold the proposals, or needs the dataset.
    """
    if format_name not in _WRITERS:
        raise ValueError(f"there is no format {format_name!r}; known: {', '.join(FORMATS)}")
    if len(set(map(str, proposals.image_ids))) < len(proposals.image_ids):
        raise ValueError("an image id occurs more than once; each image is written once")
    _WRITERS[format_name](Path(path), proposals, images)


def reinterpret_boxes(proposals: ProposalSet, box_mode: str) -> None:
    """Take the boxes of a file for what they are, against its format's convention; in place.

    Args:
        proposals: of a file; those of Segment-Anything have the boxes of their masks anyway.
        box_mode: "xyxy", "xywh" or "yxyx" (rows before columns), what stands in the file.
    """
    convention = "xywh" if proposals.format == "coco" else "xyxy"
    if proposals.format == "sam" or box_mode == convention:
        return
    # On reading, XYWH has become XYXY by adding the corner.
    sign = -1 if convention == "xywh" else 1
    for boxes_i in proposals.boxes:
        if box_mode != "yxyx" or convention == "xywh":
            boxes_i[:, 2:] += sign * boxes_i[:, :2]
        if box_mode == "yxyx":
            boxes_i[:] = boxes_i[:, [1, 0, 3, 2]]


def merge_images(proposals: ProposalSet, images: DatasetImages | None = None) -> ProposalSet:
    """One entry for each image, its proposals by descending score.

    Args:
        proposals: of a file, in which an image may be listed several times.
        images: of the dataset: all of them get an entry, which Detectron2 needs, in the dataset's
            order; images that are not in the dataset follow.

    Returns:
        A new set, without faults.
    """
    indices: dict[str, list[int]] = {}
    ids: dict[str, int | str] = {}
    for image_id in images.ids if images else ():
        indices[str(image_id)], ids[str(image_id)] = [], image_id
    for index, image_id in enumerate(proposals.image_ids):
        indices.setdefault(str(image_id), []).append(index)
        ids.setdefault(str(image_id), image_id)
    boxes, scores = [], []
    masks = None if proposals.masks is None else []
    for listed in indices.values():
        scores_i = np.concatenate([np.zeros(0), *(proposals.scores[index] for index in listed)])
        boxes_i = [np.zeros((0, 4), np.float32), *(proposals.boxes[index] for index in listed)]
        order = np.argsort(-scores_i, kind="stable")
        boxes.append(np.concatenate(boxes_i)[order])
        scores.append(scores_i[order])
        if masks is not None:
            masks_i = [mask for index in listed for mask in proposals.masks[index]]
            masks.append([masks_i[rank] for rank in order])
    return ProposalSet(
        proposals.format, list(ids.values()), boxes, scores, masks, proposals.scores_are_logits
    )


def drop_proposals(proposals: ProposalSet, top: int | None, unusable: bool) -> ProposalSet:
    """Leave proposals out.

    Args:
        proposals: sorted, as of :func:`merge_images`.
        top: keep so many best-scored ones of each image; None for all.
        unusable: leave out those that are not finite or have a negative side.
    """
    kept = []
    for boxes_i, scores_i in zip(proposals.boxes, proposals.scores, strict=True):
        keep = np.ones(len(boxes_i), bool)
        if unusable:
            keep = np.isfinite(boxes_i).all(axis=1) & np.isfinite(scores_i)
            keep &= (boxes_i[:, 2:] >= boxes_i[:, :2]).all(axis=1)
        kept.append(np.flatnonzero(keep)[:top])
    masks = proposals.masks
    if masks is not None:
        masks = [[m[rank] for rank in kept_i] for m, kept_i in zip(masks, kept, strict=True)]
    return ProposalSet(
        proposals.format,
        proposals.image_ids,
        [boxes_i[kept_i] for boxes_i, kept_i in zip(proposals.boxes, kept, strict=True)],
        [scores_i[kept_i] for scores_i, kept_i in zip(proposals.scores, kept, strict=True)],
        masks,
        proposals.scores_are_logits,
    )
