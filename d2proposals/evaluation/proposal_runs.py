"""Files of proposals under names, in the order of a dataset: what is measured and shown together.

Shape shorthand: R proposals of an image.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..files.conversion import read_proposals, reinterpret_boxes
from ..files.proposal_set import Fault
from .ground_truth import GroundTruth
from .proposal_alignment import align_to_dataset
from .proposal_checks import find_faults
from .proposal_spool import OrderedProposals, ProposalSpool


class ProposalRun(NamedTuple):
    """A file's proposals in the dataset's order.

    Attributes:
        format: of the file.
        proposals: of each image, in a temporary file unless they are few.
        usable: per image (R,) bool, which of them can be scored.
        faults: what is wrong with the file.
        has_masks: whether its proposals have masks.
    """

    format: str
    proposals: OrderedProposals
    usable: list[np.ndarray]
    faults: list[Fault]
    has_masks: bool


def name_runs(arguments: Sequence[str]) -> dict[str, str]:
    """Paths by name: as given before "=", or as short an end of the path as tells them apart.

    Args:
        arguments: each PATH or NAME=PATH.

    Raises:
        ValueError: for two files of one name.
    """
    named: dict[str, str] = {}
    for argument in arguments:
        name, separator, path = argument.partition("=")
        if not separator or os.path.exists(argument):
            path = argument
            parts = os.path.normpath(path).split(os.sep)
            name = parts[-1]
            for number in range(2, len(parts) + 1):
                if name not in named:
                    break
                name = "/".join(parts[-number:])
        if name in named:
            raise ValueError(f"two files of proposals have the name {name!r}; give NAME=PATH")
        named[name] = path
    return named


def read_run(path: str, ground_truth: GroundTruth, box_mode: str | None = None) -> ProposalRun:
    """Read a file and bring it into the dataset's order.

    What is read of the file is in memory until then: of several runs never more than one.

    Args:
        path: of any known format.
        ground_truth: of the dataset.
        box_mode: of the boxes, against the format's own.

    Raises:
        FileNotFoundError, ValueError: as ``read_proposals``.
    """
    proposals = read_proposals(path, ground_truth.images)
    if box_mode:
        reinterpret_boxes(proposals, box_mode)
    aligned, faults = align_to_dataset(proposals, ground_truth)
    spool = ProposalSpool()
    for image_id, proposals_i in zip(ground_truth.image_ids, aligned, strict=True):
        spool.add(image_id, proposals_i)
    ordered = OrderedProposals(spool, ground_truth.image_ids)
    usable, more_faults = find_faults(ordered, ground_truth)
    has_masks = proposals.masks is not None
    return ProposalRun(proposals.format, ordered, usable, faults + more_faults, has_masks)
