"""Draw the maps of ZIP's zoom network with and without map attention, as in the paper's Fig. 4.

    python tools/visualize_attention.py --config-file configs/zip_rpn_only.yaml \\
        --input street.jpg kitchen.jpg --output attention.png --level 2 \\
        MODEL.WEIGHTS output/model_final.pth

A row per image: the image, the zoom-out map F, the zoom-in map H, the head's convolution of both
without attention, and with it. A map is the mean over its channels.
"""

import argparse
import os
from collections.abc import Sequence

# Before torch is loaded: its threads would spin while they wait, which slows down whatever runs
# beside them, and themselves.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from torch import nn

from d2proposals.engine.model_command import picture_images, picture_parser, running_command
from d2proposals.zip_rpn.attention_pictures import (
    AttentionPicture,
    attention_maps,
    heat_maps,
    write_attention_sheet,
)


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = picture_parser(__doc__, "attention.png")
    parser.add_argument("--level", type=int, default=2, help="1 or 2 (default: 2)")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; ``arguments`` are those of the command line by default."""
    with running_command(build_parser(), arguments) as args:

        def make_picture(
            model: nn.Module, pixels: torch.Tensor, image: np.ndarray, name: str
        ) -> AttentionPicture:
            maps = attention_maps(model, pixels, args.level)
            stride = model.backbone.strides[args.level - 1]
            heat = heat_maps(maps, pixels.shape[-2:], stride, image.shape[:2])
            return AttentionPicture(name, image, heat)

        pictures = picture_images(args, make_picture)
        write_attention_sheet(args.output, pictures, args.level)
    print(f"{args.output}: level {args.level} of {len(pictures)} images")


if __name__ == "__main__":
    main()
