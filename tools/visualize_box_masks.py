"""Draw DetectorNet's masks and boxes, as in the paper's Fig. 3.

    python tools/visualize_box_masks.py --config-file configs/detectornet_rpn_only.yaml \\
        --input street.jpg kitchen.jpg --output box_masks.png --scale 2 \\
        MODEL.WEIGHTS output/detectornet_rpn_only/model_final.pth

A row per image: its best boxes, the mask of the full boxes, and the four masks of their halves as
colours. The masks are those of one scale of windows, merged.
"""

import argparse
import os
from collections.abc import Sequence

# Before torch is loaded: its threads would spin while they wait, which slows down whatever runs
# beside them, and themselves.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from d2proposals.detectornet.mask_pictures import picture_masks, write_mask_sheet
from d2proposals.engine.model_command import picture_images, picture_parser, running_command


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = picture_parser(__doc__, "box_masks.png")
    parser.add_argument("--scale", type=int, default=2, help="of the windows (default: 2)")
    parser.add_argument("--class-id", type=int, default=0, help="whose masks (default: 0)")
    parser.add_argument("--top", type=int, default=5, help="best boxes (default: 5)")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; ``arguments`` are those of the command line by default."""
    with running_command(build_parser(), arguments) as args:
        pictures = picture_images(
            args,
            lambda model, pixels, image, name: picture_masks(
                model, pixels, name=name, scale=args.scale, top=args.top, class_id=args.class_id
            ),
        )
        write_mask_sheet(args.output, pictures)
    print(f"{args.output}: scale {args.scale} of {len(pictures)} images")


if __name__ == "__main__":
    main()
