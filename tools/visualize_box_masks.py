"""Draw DetectorNet's masks and boxes, as in the paper's Fig. 3.

    python tools/visualize_box_masks.py --config-file configs/detectornet_rpn_only.yaml \\
        --input street.jpg kitchen.jpg --output box_masks.png --scale 2 \\
        MODEL.WEIGHTS output/detectornet_rpn_only/model_final.pth

A row per image: its best boxes, the mask of the full boxes, and the four masks of their halves as
colours. The masks are those of one scale of windows, merged.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from d2proposals.data.image_files import read_rgb_image
from d2proposals.detectornet.mask_pictures import picture_masks, write_mask_sheet
from d2proposals.engine import (
    bad_input_in_one_line,
    check_config,
    fit_to_device,
    load_config,
    load_trained_model,
    network_input_of,
)


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="configuration of the model")
    parser.add_argument(
        "--input",
        required=True,
        nargs="+",
        metavar="IMAGE",
        help="image files; between them and overrides stands another option",
    )
    parser.add_argument("--output", default="box_masks.png", help="PNG file to write")
    parser.add_argument("--scale", type=int, default=2, help="of the windows (default: 2)")
    parser.add_argument("--class-id", type=int, default=0, help="whose masks (default: 0)")
    parser.add_argument("--top", type=int, default=5, help="best boxes (default: 5)")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE overrides")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; ``arguments`` are those of the command line by default."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    args = build_parser().parse_args(arguments)
    with bad_input_in_one_line():
        cfg = load_config(args)
        fit_to_device(cfg)
        check_config(cfg)
        # Before the model, which takes longer.
        images = {path: read_rgb_image(path) for path in args.input}
        model = load_trained_model(cfg)
        network_input = network_input_of(cfg)
        pictures = []
        for path, image in images.items():
            pixels = network_input(image)
            pictures.append(
                picture_masks(
                    model,
                    pixels,
                    name=Path(path).name,
                    scale=args.scale,
                    top=args.top,
                    class_id=args.class_id,
                )
            )
        write_mask_sheet(args.output, pictures)
    print(f"{args.output}: scale {args.scale} of {len(pictures)} images")


if __name__ == "__main__":
    main()
