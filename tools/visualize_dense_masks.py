"""Draw the masks that DeepMask predicts at every window of a row, as in the paper's Fig. 2.

    python tools/visualize_dense_masks.py --config-file configs/deepmask_rpn_only.yaml \\
        --input street.jpg kitchen.jpg --output dense_masks.png \\
        MODEL.WEIGHTS output/deepmask_rpn_only/model_final.pth

A row per image: the image with the windows' centres in its middle row, and what each of these
windows shows, its mask in colour, whatever its score.
"""

import argparse
import os
from collections.abc import Sequence

# Before torch is loaded: its threads would spin while they wait, which slows down whatever runs
# beside them, and themselves.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from d2proposals.deepmask.dense_pictures import make_picture, write_sheet
from d2proposals.engine.model_command import picture_images, picture_parser, running_command


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = picture_parser(__doc__, "dense_masks.png")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the image (default: 1)")
    parser.add_argument("--windows", type=int, default=24, help="windows to draw (default: 24)")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; ``arguments`` are those of the command line by default."""
    with running_command(build_parser(), arguments) as args:
        pictures = picture_images(
            args,
            lambda model, pixels, image, name: make_picture(
                model, pixels, name=name, scale=args.scale, num_windows=args.windows
            ),
        )
        write_sheet(args.output, pictures)
    print(f"{args.output}: {len(pictures)} images")


if __name__ == "__main__":
    main()
