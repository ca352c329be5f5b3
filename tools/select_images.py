"""Keep those images of a COCO-style annotation file, and their objects, that a list names.

    python tools/select_images.py datasets/coco/annotations/instances_val2017.json val.json \\
        --ids docs/results/coco_image_ids.json --list coco_2017_val

The list is a JSON file: image ids, or several lists of them by name. That in docs/results/ has the
photographs that this project's tables were trained and measured on (docs/photos.md).
"""

import argparse
import os
from collections.abc import Sequence

# Before torch is loaded: its threads would spin while they wait, which slows down whatever runs
# beside them, and themselves.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from d2proposals.engine import bad_input_in_one_line
from d2proposals.files.atomic_files import write_json
from d2proposals.files.image_lists import read_ids, read_json, select_images


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", help="COCO-style annotations")
    parser.add_argument("output", help="JSON file to write")
    parser.add_argument("--ids", required=True, metavar="FILE.json", help="image ids")
    parser.add_argument("--list", metavar="NAME", help="which list, where the file has several")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; ``arguments`` are those of the command line by default."""
    args = build_parser().parse_args(arguments)
    with bad_input_in_one_line():
        chosen = select_images(read_json(args.input), read_ids(args.ids, args.list))
        write_json(args.output, chosen)
    print(
        f"{args.output}: {len(chosen['images'])} images, {len(chosen['annotations'])} annotations"
    )


if __name__ == "__main__":
    main()
