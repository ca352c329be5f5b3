"""Draw what SPOP's networks say of each pixel, as in the paper's Fig. 14.

    python tools/visualize_spop.py --config-file configs/spop_rpn_only.yaml \\
        --input street.jpg kitchen.jpg --output spop.png \\
        MODEL.WEIGHTS output/spop_rpn_only/model_final.pth

A row per image: the image, objectness, large-size confidence, an arrow from each cell on an object
to the centre of the box that it predicts, and the best boxes. Yellow: the cell is confident of a
large object; magenta: of a small one.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from d2proposals.data.image_files import read_rgb_image
from d2proposals.engine import (
    bad_input_in_one_line,
    check_config,
    fit_to_device,
    load_config,
    load_trained_model,
    network_input_of,
)
from d2proposals.spop.localization_error import find_spop
from d2proposals.spop.pictures import make_picture, write_sheet


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
    parser.add_argument("--output", default="spop.png", help="PNG file to write")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the image (default: 1)")
    parser.add_argument("--boxes", type=int, default=20, help="boxes to draw (default: 20)")
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
        find_spop(model)
        network_input = network_input_of(cfg)
        pictures = []
        for path, image in images.items():
            pixels = network_input(image)
            pictures.append(
                make_picture(
                    model,
                    pixels,
                    name=Path(path).name,
                    scale=args.scale,
                    num_boxes=args.boxes,
                )
            )
        write_sheet(args.output, pictures)
    print(f"{args.output}: {len(pictures)} images")


if __name__ == "__main__":
    main()
