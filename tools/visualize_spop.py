"""Draw what SPOP's networks say of each pixel, as in the paper's Fig. 14.

    python tools/visualize_spop.py --config-file configs/spop_rpn_only.yaml \\
        --input street.jpg kitchen.jpg --output spop.png \\
        MODEL.WEIGHTS output/spop_rpn_only/model_final.pth

A row per image: the image, objectness, large-size confidence, an arrow from each cell on an object
to the centre of the box that it predicts, and the best boxes. Yellow: the cell is confident of a
large object; magenta: of a small one.
"""

import argparse
import functools
import os
from collections.abc import Sequence

# Before torch is loaded: its threads would spin while they wait, which slows down whatever runs
# beside them, and themselves.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from d2proposals.engine.model_command import picture_parser, run_picture_command
from d2proposals.spop.pictures import SPOPPicture, make_picture, write_sheet

SCALE, BOXES = (1.0, "factor on the image as it was taken"), (20, "boxes to draw")
build_parser = functools.partial(picture_parser, __doc__, "spop.png", scale=SCALE, boxes=BOXES)


def draw(args: argparse.Namespace, model, pixels, image, name: str) -> SPOPPicture:
    """A row of the sheet; arguments as of ``run_picture_command``."""
    return make_picture(model, pixels, name=name, scale=args.scale, num_boxes=args.boxes)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; ``arguments`` are those of the command line by default."""
    run_picture_command(
        build_parser(), arguments, draw, lambda args, rows: write_sheet(args.output, rows)
    )


if __name__ == "__main__":
    main()
