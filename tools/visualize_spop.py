"""Draw what SPOP's networks say of each pixel, as in the paper's Fig. 14.

    python tools/visualize_spop.py --config-file configs/spop_rpn_only.yaml \\
        --input street.jpg kitchen.jpg --output spop.png \\
        MODEL.WEIGHTS output/spop_rpn_only/model_final.pth

A row per image: the image, objectness, large-size confidence, an arrow from each cell on an object
to the centre of the box that it predicts, and the best boxes. Yellow: the cell is confident of a
large object; magenta: of a small one.
"""

import argparse
import os
from collections.abc import Sequence

# Before torch is loaded: its threads would spin while they wait, which slows down whatever runs
# beside them, and themselves.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from d2proposals.engine.model_command import picture_images, picture_parser, running_command
from d2proposals.spop.pictures import make_picture, write_sheet


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = picture_parser(__doc__, "spop.png")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="factor on the image as it was taken (default: 1)"
    )
    parser.add_argument("--boxes", type=int, default=20, help="boxes to draw (default: 20)")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; ``arguments`` are those of the command line by default."""
    with running_command(build_parser(), arguments) as args:
        pictures = picture_images(
            args,
            lambda model, pixels, image, name: make_picture(
                model, pixels, name=name, scale=args.scale, num_boxes=args.boxes
            ),
        )
        write_sheet(args.output, pictures)
    print(f"{args.output}: {len(pictures)} images")


if __name__ == "__main__":
    main()
