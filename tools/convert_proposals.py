"""Convert proposals between formats; the format of the input is recognised.

    python tools/convert_proposals.py box_proposals.pkl proposals.json --to coco
    python tools/convert_proposals.py sam_output/ masks.json --to coco --dataset coco_2017_val
    python tools/convert_proposals.py results.json for_training.pkl --to detectron2 --gt train.json

Formats: detectron2 (MODEL.LOAD_PROPOSALS), coco, mmdet3, mmdet2, sam, d2proposals. With a dataset
every image of it gets an entry, which Detectron2 and mmdetection need. Scores stay what they are
where the formats agree; between logits and probabilities they are converted.
"""

import argparse
import os
import sys
from collections.abc import Sequence

# Before torch is loaded: its threads would spin while they wait, which slows down whatever runs
# beside them, and themselves.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np

from d2proposals.engine import bad_input_in_one_line
from d2proposals.engine.dataset_source import add_dataset_source, named_datasets
from d2proposals.evaluation.ground_truth import load_ground_truth
from d2proposals.files.conversion import (
    FORMATS,
    drop_proposals,
    merge_images,
    read_proposals,
    reinterpret_boxes,
    write_proposals,
)
from d2proposals.files.proposal_set import DatasetImages, name_some


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", help="file (Segment-Anything: folder) of proposals")
    parser.add_argument("output", help="file to write; a new folder for the format sam")
    parser.add_argument("--to", required=True, choices=FORMATS, help="format of the output")
    add_dataset_source(
        parser, "registered dataset: its images, their names and order", required=False
    )
    parser.add_argument(
        "--box-mode",
        choices=("xyxy", "xywh", "yxyx"),
        help="of the input, against its format's own",
    )
    parser.add_argument("--top", type=int, metavar="K", help="keep the K best of each image")
    parser.add_argument(
        "--drop-unusable", action="store_true", help="leave out NaN and negative sides"
    )
    return parser


def find_images(args: argparse.Namespace) -> DatasetImages | None:
    """The images of the dataset that the arguments name."""
    names = named_datasets(args)
    return load_ground_truth(names[0]).images if names else None


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; ``arguments`` are those of the command line by default."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    if args.top is not None and args.top < 1:
        parser.error(f"--top must be at least 1, not {args.top}")
    with bad_input_in_one_line():
        images = find_images(args)
        proposals = read_proposals(args.input, images)
        for fault in proposals.faults:
            print(f"warning: {args.input}: [{fault.name}] {fault.message}", file=sys.stderr)
        if args.box_mode:
            reinterpret_boxes(proposals, args.box_mode)
        from_format, had_masks = proposals.format, proposals.masks is not None
        known = set(map(str, images.ids)) if images else None
        foreign = {x for x in map(str, proposals.image_ids) if known is not None and x not in known}
        if foreign:
            print(
                f"warning: {args.input}: [unknown-images] {len(foreign)} of its images do not "
                f"belong to the dataset ({name_some(sorted(foreign))}) and follow behind the "
                "others; is it the right dataset and split?",
                file=sys.stderr,
            )
        proposals = merge_images(proposals, images)
        proposals = drop_proposals(proposals, args.top, args.drop_unusable)
        write_proposals(args.output, proposals, args.to, images)
    if had_masks and args.to in ("detectron2", "mmdet2", "mmdet3"):
        print(f"warning: the format {args.to} has no masks; boxes only", file=sys.stderr)
    if args.to == "sam" and from_format != "sam":
        print("warning: the format sam has no boxes but those around the masks", file=sys.stderr)
    number = int(np.sum([len(boxes_i) for boxes_i in proposals.boxes], dtype=np.int64))
    print(
        f"{args.output}: {number} proposals of {len(proposals.image_ids)} images, "
        f"{from_format} -> {args.to}"
    )


if __name__ == "__main__":
    main()
