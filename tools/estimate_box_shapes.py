"""Estimate the aspect ratios of a dataset's boxes, for DetectorNet's search.

    python tools/estimate_box_shapes.py --dataset coco_2017_train --output box_shapes.yaml

The output is a configuration with MODEL.DETECTORNET.ASPECT_RATIOS, to be listed in _BASE_:

    _BASE_: ["detectornet_rpn_only.yaml", "box_shapes.yaml"]
"""

import argparse
import os
from collections.abc import Sequence

# Before torch is loaded: its threads would spin while they wait, which slows down whatever runs
# beside them, and themselves.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import yaml

from d2proposals.data.dataset_reading import read_dataset
from d2proposals.detectornet.box_shapes import cluster_aspect_ratios, dataset_aspect_ratios
from d2proposals.engine import bad_input_in_one_line
from d2proposals.engine.dataset_source import add_dataset_source, named_datasets
from d2proposals.files.atomic_files import atomic_write


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_dataset_source(parser, "registered datasets", several=True)
    parser.add_argument("--number", type=int, default=10, help="of aspect ratios (default: 10)")
    parser.add_argument("--output", default="box_shapes.yaml", help="YAML file to write")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; ``arguments`` are those of the command line by default."""
    args = build_parser().parse_args(arguments)
    with bad_input_in_one_line():
        records = [
            record
            for name in named_datasets(args)
            for record in read_dataset(name, needs_ids=False).records
        ]
        ratios = dataset_aspect_ratios(records)
        found = [round(x, 3) for x in cluster_aspect_ratios(ratios, args.number).tolist()]
        names = ", ".join(args.gt or args.dataset)
        # A flow sequence, as in the other configurations.
        values = yaml.safe_dump({"ASPECT_RATIOS": found}, default_flow_style=None, width=100)
        with atomic_write(args.output) as file:
            file.write(
                f"# Width / height: k-means, {len(ratios)} boxes of {names}.\n"
                f"MODEL:\n  DETECTORNET:\n    {values}VERSION: 2\n"
            )
    print(f"{args.output}: {len(found)} aspect ratios of {len(ratios)} boxes: {found}")


if __name__ == "__main__":
    main()
