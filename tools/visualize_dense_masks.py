"""Draw the masks that DeepMask predicts at every window of a row, as in the paper's Fig. 2.

    python tools/visualize_dense_masks.py --config-file configs/deepmask_rpn_only.yaml \\
        --input street.jpg kitchen.jpg --output dense_masks.png \\
        MODEL.WEIGHTS output/deepmask_rpn_only/model_final.pth

A row per image: the image with the windows' centres in its middle row, and what each of these
windows shows, its mask in colour, whatever its score.
"""

import argparse
import functools
import os
from collections.abc import Sequence

# Before torch is loaded: its threads would spin while they wait, which slows down whatever runs
# beside them, and themselves.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from d2proposals.deepmask.dense_pictures import make_dense_picture, write_sheet
from d2proposals.engine.model_command import picture_parser, run_picture_command

OPTIONS = {"scale": (1.0, "factor on the image"), "windows": (24, "windows to draw")}
build_parser = functools.partial(picture_parser, __doc__, "dense_masks.png", **OPTIONS)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; ``arguments`` are those of the command line by default."""

    def draw(args: argparse.Namespace, model, pixels, image, name: str):
        return make_dense_picture(model, pixels, name, args.scale, args.windows)

    def write(args: argparse.Namespace, pictures: list) -> None:
        write_sheet(args.output, pictures)

    run_picture_command(build_parser(), arguments, draw, write)


if __name__ == "__main__":
    main()
