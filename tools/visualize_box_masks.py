"""Draw DetectorNet's masks and boxes, as in the paper's Fig. 3.

    python tools/visualize_box_masks.py --config-file configs/detectornet_rpn_only.yaml \\
        --input street.jpg kitchen.jpg --output box_masks.png --scale 2 \\
        MODEL.WEIGHTS output/detectornet_rpn_only/model_final.pth

A row per image: its best boxes, the mask of the full boxes, and the four masks of their halves as
colours. The masks are those of one scale of windows, merged.
"""

import argparse
import functools
import os
from collections.abc import Sequence

# Before torch is loaded: its threads would spin while they wait, which slows down whatever runs
# beside them, and themselves.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from d2proposals.detectornet.mask_pictures import MaskPicture, picture_masks, write_mask_sheet
from d2proposals.engine.model_command import picture_parser, run_picture_command

build_parser = functools.partial(
    picture_parser,
    __doc__,
    "box_masks.png",
    scale=(2, "of the windows"),
    class_id=(0, "whose masks"),
    top=(5, "best boxes"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; ``arguments`` are those of the command line by default."""

    def write(args: argparse.Namespace, pictures: list[MaskPicture]) -> str:
        write_mask_sheet(args.output, pictures)
        return f"scale {args.scale} of "

    run_picture_command(
        build_parser(),
        arguments,
        lambda args, model, pixels, image, name: picture_masks(
            model, pixels, name=name, scale=args.scale, top=args.top, class_id=args.class_id
        ),
        write,
    )


if __name__ == "__main__":
    main()
