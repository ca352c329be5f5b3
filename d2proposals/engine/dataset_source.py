"""What a command reads annotations of: a registered dataset, or a COCO-style file as it lies."""

from __future__ import annotations

import argparse
from typing import Any

from ..files.annotation_file import register_annotation_file
from .job import check_datasets


def add_dataset_source(
    parser: argparse.ArgumentParser,
    help_text: str = "registered dataset, e.g. coco_2017_val",
    *,
    required: bool = True,
    several: bool = False,
) -> None:
    """Add ``--dataset NAME`` and, in its place, ``--gt FILE.json``.

    Args:
        parser: of the command.
        help_text: of ``--dataset``.
        required: whether one of both has to be there.
        several: whether each takes several names.
    """
    number: dict[str, Any] = {"nargs": "+"} if several else {}
    source = parser.add_mutually_exclusive_group(required=required)
    source.add_argument("--dataset", help=help_text, **number)
    source.add_argument(
        "--gt", metavar="FILE.json", help="COCO-style annotations instead", **number
    )


def named_datasets(args: argparse.Namespace, image_root: str | None = None) -> list[str]:
    """Names of the registered datasets that the arguments name; [] for none.

    Args:
        args: with ``dataset`` and ``gt``, of :func:`add_dataset_source`.
        image_root: folder of the images of the files; by default a file's own.

    Raises:
        FileNotFoundError, ValueError: a dataset or file is not there, or no file of annotations.
    """
    if args.gt:
        paths = [args.gt] if isinstance(args.gt, str) else args.gt
        return [register_annotation_file(path, image_root) for path in paths]
    names = [args.dataset] if isinstance(args.dataset, str) else args.dataset or []
    check_datasets(names)
    return names
