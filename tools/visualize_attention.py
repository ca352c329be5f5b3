"""Draw the maps of ZIP's zoom network with and without map attention, as in the paper's Fig. 4.

    python tools/visualize_attention.py --config-file configs/zip_rpn_only.yaml \\
        --input street.jpg kitchen.jpg --output attention.png --level 2 \\
        MODEL.WEIGHTS output/model_final.pth

A row per image: the image, the zoom-out map F, the zoom-in map H, the head's convolution of both
without attention, and with it. A map is the mean over its channels.
"""

import argparse
import functools
import os
from collections.abc import Sequence

# Before torch is loaded: its threads would spin while they wait, which slows down whatever runs
# beside them, and themselves.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from torch import nn

from d2proposals.engine.model_command import picture_parser, run_picture_command
from d2proposals.zip_rpn.attention_pictures import (
    AttentionPicture,
    attention_maps,
    heat_maps,
    write_attention_sheet,
)

build_parser = functools.partial(
    picture_parser,
    __doc__,
    "attention.png",
    level=(2, "1 or 2"),
)


def make_picture(
    args: argparse.Namespace, model: nn.Module, pixels: torch.Tensor, image: np.ndarray, name: str
) -> AttentionPicture:
    """The image's maps on the level that the arguments name."""
    maps = attention_maps(model, pixels, args.level)
    stride = model.backbone.strides[args.level - 1]
    heat = heat_maps(maps, pixels.shape[-2:], stride, image.shape[:2])
    return AttentionPicture(name, image, heat)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; ``arguments`` are those of the command line by default."""

    def write(args: argparse.Namespace, pictures: list[AttentionPicture]) -> str:
        write_attention_sheet(args.output, pictures, args.level)
        return f"level {args.level} of "

    run_picture_command(build_parser(), arguments, make_picture, write)


if __name__ == "__main__":
    main()
