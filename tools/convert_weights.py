"""Convert public ImageNet weights into a checkpoint for MODEL.WEIGHTS.

    python tools/convert_weights.py --architecture bn_inception IN.pth OUT.pkl
    python tools/convert_weights.py --architecture bn_inception --zoom-network IN.pth OUT.pkl

The first form's weights fit the network wherever it stands in a model (as a backbone, under an
FPN). The second form's are for a model whose backbone is ZIP's zoom network: the zoom-out part, and
copies for the mirrored blocks.

bn_inception reads the file of `bninception` of pretrained-models.pytorch. The model needs
INPUT.FORMAT "BGR", MODEL.PIXEL_MEAN [104, 117, 128] and the MODEL.PIXEL_STD given by --pixel-std,
whose default is that of configs/zip_rpn_only.yaml.
"""

import argparse
import logging
from collections.abc import Sequence

import torch

from d2proposals.backbones.bn_inception import BNInception
from d2proposals.backbones.weight_conversion import (
    CONVERTERS,
    read_weights,
    write_checkpoint,
    zoom_network_weights,
)
from d2proposals.zip_rpn.zoom_network import ZoomNetwork


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", help="file of the public weights, as saved by torch.save")
    parser.add_argument("output", help="checkpoint to write, ending in .pkl")
    parser.add_argument(
        "--architecture", required=True, choices=sorted(CONVERTERS), help="network of the weights"
    )
    parser.add_argument(
        "--trainable-norm",
        action="store_true",
        help='for NORM "BN" or "SyncBN": biases are folded into the running means',
    )
    parser.add_argument(
        "--pixel-std",
        type=float,
        nargs=3,
        default=(57.375, 57.12, 58.395),
        metavar=("B", "G", "R"),
        help="MODEL.PIXEL_STD of the configuration (default: 57.375 57.12 58.395)",
    )
    parser.add_argument(
        "--zoom-network",
        action="store_true",
        help="write full names for ZIP's zoom network and its mirrored blocks",
    )
    parser.add_argument(
        "--mirror-depths",
        type=int,
        nargs=3,
        default=(2, 4, 2),
        metavar=("LEVEL3", "LEVEL2", "LEVEL1"),
        help="MODEL.ZOOM_NETWORK.MIRROR_DEPTHS of the configuration (default: 2 4 2)",
    )
    return parser


def build_zoom_network_state(
    mirror_depths: Sequence[int], *, trainable_norm: bool
) -> dict[str, torch.Tensor]:
    """Names and shapes of a full-size zoom network's weights, without memory behind them."""
    norm = "BN" if trainable_norm else "FrozenBN"
    with torch.device("meta"):
        bottom_up = BNInception(norm=norm)
        network = ZoomNetwork(
            bottom_up=bottom_up,
            in_features=list(bottom_up.output_shape()),
            mirror_depths=mirror_depths,
            norm=norm,
        )
    return network.state_dict()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; ``arguments`` are those of the command line by default."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = build_parser()
    args = parser.parse_args(arguments)
    if args.zoom_network and args.architecture != "bn_inception":
        parser.error("--zoom-network goes with --architecture bn_inception only")
    try:
        public = read_weights(args.input)
        weights = CONVERTERS[args.architecture](
            public, fold_bias=args.trainable_norm, pixel_std=args.pixel_std
        )
        if args.zoom_network:
            state = build_zoom_network_state(args.mirror_depths, trainable_norm=args.trainable_norm)
            weights = zoom_network_weights(weights, state)
        write_checkpoint(args.output, weights, matching_heuristics=not args.zoom_network)
    except (OSError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    print(f"{args.output}: {len(weights)} tensors of {args.architecture}")


if __name__ == "__main__":
    main()
