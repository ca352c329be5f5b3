"""Draw the sizes of a dataset's objects and ZIP's anchors, by level, as in the paper's Fig. 5.

    python tools/plot_anchor_sizes.py --config-file configs/zip_rpn_only.yaml \\
        --dataset coco_2017_val --output anchors.png

Objects have the size of the network input at the test (INPUT.MIN_SIZE_TEST). No image is read, and
no weights are needed.
"""

import functools
import os
from collections.abc import Sequence

# Before torch is loaded: its threads would spin while they wait, which slows down whatever runs
# beside them, and themselves.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from detectron2.modeling import build_anchor_generator, build_backbone

from d2proposals.engine.checked_datasets import records_to_test
from d2proposals.engine.model_command import (
    command_config,
    dataset_of,
    model_parser,
    running_command,
)
from d2proposals.engine.trained_model import without_trunk_weights
from d2proposals.zip_rpn.anchor_scatter import best_levels, object_sizes, write_anchor_picture

DATASET = (None, "registered dataset (default: of DATASETS.TEST)")
OUTPUT = ("anchors.png", "image file to write")
build_parser = functools.partial(model_parser, __doc__, dataset=DATASET, output=OUTPUT)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; ``arguments`` are those of the command line by default."""
    parser = build_parser()
    with running_command(parser, arguments) as args:
        cfg = command_config(args, "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "")
        generator = cfg.MODEL.PROPOSAL_GENERATOR.NAME
        if generator != "ZIP":
            parser.error(f"the anchors are ZIP's, the configuration has {generator}")
        name = dataset_of(args, cfg, parser)
        with torch.device("meta"):  # its maps' shapes are all that is needed
            shapes = build_backbone(without_trunk_weights(cfg)).output_shape()
        shapes = [shapes[feature] for feature in cfg.MODEL.ZIP.IN_FEATURES]
        anchors = [
            np.asarray(a[:, 2:] - a[:, :2])
            for a in build_anchor_generator(cfg, shapes).cell_anchors
        ]
        sizes = object_sizes(
            records_to_test(cfg, name), cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
        )
        if not len(sizes):
            parser.error(f"{name} has no objects to draw")
        title = f"{name}, shorter side {cfg.INPUT.MIN_SIZE_TEST or 'as it is'}"
        write_anchor_picture(args.output, sizes, anchors, title)
        counts = np.bincount(best_levels(sizes, anchors), minlength=len(anchors))
    print(f"{args.output}: {len(sizes)} objects, by level {', '.join(map(str, counts))}")


if __name__ == "__main__":
    main()
