"""Draw the maps of ZIP's zoom network with and without map attention, as in the paper's Fig. 4.

    python tools/visualize_attention.py --config-file configs/zip_rpn_only.yaml \\
        --input street.jpg kitchen.jpg --output attention.png --level 2 \\
        MODEL.WEIGHTS output/model_final.pth

A row per image: the image, the zoom-out map F, the zoom-in map H, the head's convolution of both
without attention, and with it. A map is the mean over its channels.
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
from d2proposals.zip_rpn.attention_pictures import (
    AttentionPicture,
    attention_maps,
    heat_maps,
    write_attention_sheet,
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
    parser.add_argument("--output", default="attention.png", help="PNG file to write")
    parser.add_argument("--level", type=int, default=2, help="1 or 2 (default: 2)")
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
            maps = attention_maps(model, pixels, args.level)
            stride = model.backbone.strides[args.level - 1]
            heat = heat_maps(maps, pixels.shape[-2:], stride, image.shape[:2])
            pictures.append(AttentionPicture(Path(path).name, image, heat))
        write_attention_sheet(args.output, pictures, args.level)
    print(f"{args.output}: level {args.level} of {len(pictures)} images")


if __name__ == "__main__":
    main()
