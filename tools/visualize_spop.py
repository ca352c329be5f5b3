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

import torch
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from detectron2.modeling import build_model

from d2proposals.data.image_files import read_rgb_image, to_input_format
from d2proposals.engine import (
    ProposalCheckpointer,
    bad_input_in_one_line,
    check_config,
    fit_to_device,
    load_config,
)
from d2proposals.spop.localization_error import find_spop
from d2proposals.spop.pictures import make_picture, write_sheet

logger = logging.getLogger("d2proposals.visualize_spop")


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
        model = build_model(cfg).eval()
        find_spop(model)
        if not cfg.MODEL.WEIGHTS:
            logger.warning("Drawing maps of random weights: name a checkpoint in MODEL.WEIGHTS.")
        ProposalCheckpointer(model).load(cfg.MODEL.WEIGHTS)
        augmentations = T.AugmentationList(detection_utils.build_augmentation(cfg, False))
        pictures = []
        for path, image in images.items():
            aug_input = T.AugInput(to_input_format(image, cfg.INPUT.FORMAT))
            augmentations(aug_input)
            network_input = torch.from_numpy(aug_input.image.transpose(2, 0, 1).copy())
            pictures.append(
                make_picture(
                    model,
                    network_input,
                    name=Path(path).name,
                    scale=args.scale,
                    num_boxes=args.boxes,
                )
            )
        write_sheet(args.output, pictures)
    print(f"{args.output}: {len(pictures)} images")


if __name__ == "__main__":
    main()
