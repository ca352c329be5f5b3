"""Convert public ImageNet weights into a checkpoint for MODEL.WEIGHTS, or that of one part.

    python tools/convert_weights.py --architecture bn_inception IN.pth OUT.pkl
    python tools/convert_weights.py --architecture bn_inception --zoom-network IN.pth OUT.pkl

The first form's weights fit the network wherever it stands in a model (as a backbone, under an
FPN). The second form's are for a model whose backbone is ZIP's zoom network: the zoom-out part, and
copies for the mirrored blocks.

With --follow-up they are for ZIP's detector (configs/zip_detector.yaml), whose follow-up blocks
start from a ResNet-101: torchvision's file of that name, or Detectron2's R-101.pkl, which needs
MODEL.ZIP_DETECTOR.STRIDE_IN_1X1 True if it is MSRA's:

    python tools/convert_weights.py --architecture bn_inception --zoom-network \\
        --follow-up resnet101.pth IN.pth OUT.pkl

bn_inception reads the file of `bninception` of pretrained-models.pytorch. The model needs
INPUT.FORMAT "BGR", MODEL.PIXEL_MEAN [104, 117, 128] and the MODEL.PIXEL_STD given by --pixel-std,
whose default is that of configs/zip_rpn_only.yaml.

vgg11 reads torchvision's file of that name, for the trunk of configs/deepmask_rpn_only.yaml. With
--separate-trunks its weights get full names, in a copy for each trunk of a DeepMask that has two
(MODEL.DEEPMASK.SHARED_TRUNK False) or that stands in a model with another VGG:

    python tools/convert_weights.py --architecture vgg11 --separate-trunks IN.pth OUT.pkl

alexnet reads torchvision's file of that name, and makes a copy for each network of the model that
--config-file describes:

    python tools/convert_weights.py --architecture alexnet \\
        --config-file configs/detectornet_rpn_only.yaml IN.pth OUT.pkl

deeplab_largefov, vgg16 (torchvision's) and vgg16_reducedfc become a copy for each of SPOP's three
networks, see docs/spop.md for the pixels that each expects.
"""

import argparse
import logging
import os
from collections.abc import Sequence

# Before torch is loaded: its threads would spin while they wait, which slows down whatever runs
# beside them, and themselves.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from detectron2.modeling import build_model

from d2proposals.backbones.alexnet_conversion import alexnet_copies, convert_alexnet
from d2proposals.backbones.bn_inception import BNInception
from d2proposals.backbones.follow_up_conversion import convert_follow_up, read_resnet_weights
from d2proposals.backbones.largefov_conversion import (
    LARGEFOV_CONVERTERS,
    SCALE_AWARE_NETWORKS,
    SINGLE_NETWORKS,
    spop_weights,
)
from d2proposals.backbones.weight_conversion import (
    CONVERTERS,
    deepmask_weights,
    read_weights,
    write_checkpoint,
    zoom_network_weights,
)
from d2proposals.engine import load_config
from d2proposals.zip_rpn.follow_up import FollowUpBlocks
from d2proposals.zip_rpn.zoom_network import ZoomNetwork


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", help="file of the public weights, as saved by torch.save")
    parser.add_argument("output", help="checkpoint to write, ending in .pkl")
    parser.add_argument(
        "--architecture",
        required=True,
        choices=sorted([*CONVERTERS, *LARGEFOV_CONVERTERS, "alexnet"]),
        help="network of the weights",
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
    parser.add_argument(
        "--follow-up",
        metavar="RESNET101",
        help="with --zoom-network: ResNet-101's weights, for ZIP's detector",
    )
    parser.add_argument(
        "--single-network",
        action="store_true",
        help="for SPOP without scale-awareness: copies for its two networks",
    )
    parser.add_argument(
        "--separate-trunks",
        action="store_true",
        help="for vgg11: write full names, for each of DeepMask's two trunks",
    )
    parser.add_argument("--config-file", help="for alexnet: configuration of the model")
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


def follow_up_weights(path: str, *, trainable_norm: bool) -> dict[str, torch.Tensor]:
    """Weights of the follow-up blocks of ZIP's detector, from a file of ResNet-101's."""
    with torch.device("meta"):
        blocks = FollowUpBlocks(norm="BN" if trainable_norm else "FrozenBN")
    weights = convert_follow_up(read_resnet_weights(path), blocks.state_dict())
    return {f"roi_heads.box_head.{key}": value for key, value in weights.items()}


def build_narrow_model(config_file: str) -> torch.nn.Module:
    """A configuration's model with AlexNets of few channels: the names of its weights are equal."""
    cfg = load_config(argparse.Namespace(config_file=config_file, opts=[]))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.DETECTORNET.WIDTH_FACTOR = 0.01
    return build_model(cfg)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; ``arguments`` are those of the command line by default."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = build_parser()
    args = parser.parse_args(arguments)
    if args.zoom_network and args.architecture != "bn_inception":
        parser.error("--zoom-network goes with --architecture bn_inception only")
    if args.follow_up and not args.zoom_network:
        parser.error("--follow-up goes with --zoom-network only")
    if args.separate_trunks and args.architecture != "vgg11":
        parser.error("--separate-trunks goes with --architecture vgg11 only")
    is_alexnet = args.architecture == "alexnet"
    if is_alexnet != (args.config_file is not None):
        parser.error("--config-file goes with --architecture alexnet, which needs it")
    try:
        public = read_weights(args.input)
        options = {}
        if args.architecture == "bn_inception":
            options = {"fold_bias": args.trainable_norm, "pixel_std": args.pixel_std}
        converters = CONVERTERS | LARGEFOV_CONVERTERS | {"alexnet": convert_alexnet}
        weights = converters[args.architecture](public, **options)
        is_spop = args.architecture in LARGEFOV_CONVERTERS
        if is_spop:
            networks = SINGLE_NETWORKS if args.single_network else SCALE_AWARE_NETWORKS
            weights = spop_weights(weights, networks)
        if is_alexnet:
            weights = alexnet_copies(weights, build_narrow_model(args.config_file))
        if args.separate_trunks:
            weights = deepmask_weights(weights)
        if args.zoom_network:
            state = build_zoom_network_state(args.mirror_depths, trainable_norm=args.trainable_norm)
            weights = zoom_network_weights(weights, state)
        if args.follow_up:
            weights |= follow_up_weights(args.follow_up, trainable_norm=args.trainable_norm)
        has_full_names = args.zoom_network or args.separate_trunks or is_spop or is_alexnet
        write_checkpoint(args.output, weights, matching_heuristics=not has_full_names)
    except (OSError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    print(f"{args.output}: {len(weights)} tensors of {args.architecture}")


if __name__ == "__main__":
    main()
