"""Convert public weights into a checkpoint for MODEL.WEIGHTS, or that of one part.

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

The zoom network over VGG-16 (configs/zip_vgg16_detector.yaml) reads torchvision's vgg16, or its
convolutional part alone (features.0.weight ...), of any precision; with --pixels caffe, weights
under the same names that come from the network's first release:

    python tools/convert_weights.py --architecture vgg16 --zoom-network \\
        --follow-up resnet101.pth IN.pth OUT.pkl

bn_inception reads the file of `bninception` of pretrained-models.pytorch.

Either way the first convolution is turned into one for the configuration's pixels: INPUT.FORMAT
"BGR", the configuration's MODEL.PIXEL_MEAN (bn_inception: [104, 117, 128], vgg16: [103.53, 116.28,
123.675]) and the MODEL.PIXEL_STD given by --pixel-std, whose default is that of both
configurations.

vgg11 reads torchvision's file of that name, for the trunk of configs/deepmask_rpn_only.yaml. With
--separate-trunks its weights get full names, in a copy for each trunk of a DeepMask that has two
(MODEL.DEEPMASK.SHARED_TRUNK False) or that stands in a model with another VGG:

    python tools/convert_weights.py --architecture vgg11 --separate-trunks IN.pth OUT.pkl

alexnet reads torchvision's file of that name, and makes a copy for each network of the model that
--config-file describes:

    python tools/convert_weights.py --architecture alexnet \\
        --config-file configs/detectornet_rpn_only.yaml IN.pth OUT.pkl

Without --zoom-network, deeplab_largefov, vgg16 (torchvision's) and vgg16_reducedfc become a copy
for each of SPOP's three networks, see docs/spop.md for the pixels that each expects.

deepmask_r50 reads the Torch7 file of a whole DeepMask that its authors released, for
configs/deepmask_r50_rpn_only.yaml:

    python tools/convert_weights.py --architecture deepmask_r50 model.t7 OUT.pkl
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
from d2proposals.backbones.torchvision_weights import PIXELS
from d2proposals.backbones.vgg import VGG, VGG_D
from d2proposals.backbones.vgg_zoom_conversion import convert_vgg16_zoom
from d2proposals.backbones.weight_conversion import (
    CONVERTERS,
    convert_bn_inception,
    deepmask_weights,
    read_weights,
    write_checkpoint,
    zoom_network_weights,
)
from d2proposals.deepmask.released_weights import read_released_weights
from d2proposals.engine import load_config
from d2proposals.engine.trained_model import without_trunk_weights
from d2proposals.zip_rpn.follow_up import FollowUpBlocks
from d2proposals.zip_rpn.zoom_network import ZoomNetwork

# MODEL.PIXEL_STD of ZIP's configurations.
PIXEL_STD = (57.375, 57.12, 58.395)
# MODEL.ZOOM_NETWORK.MIRROR_DEPTHS of the full-size networks.
MIRROR_DEPTHS = {"bn_inception": (2, 4, 2), "vgg16": (1, 3, 3)}


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "input", help="file of the public weights, as saved by torch.save (of Lua for deepmask_r50)"
    )
    parser.add_argument("output", help="checkpoint to write, ending in .pkl")
    parser.add_argument(
        "--architecture",
        required=True,
        choices=sorted([*CONVERTERS, *LARGEFOV_CONVERTERS, "alexnet", "deepmask_r50"]),
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
        metavar=("B", "G", "R"),
        help="MODEL.PIXEL_STD of the configuration (default: 57.375 57.12 58.395)",
    )
    parser.add_argument(
        "--pixels",
        choices=sorted(PIXELS),
        default="torchvision",
        help="for vgg16 with --zoom-network: pixels that the file's weights expect, RGB with "
        "torchvision's mean and deviation or BGR minus the mean (default: torchvision)",
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
        metavar=("LEVEL3", "LEVEL2", "LEVEL1"),
        help="MODEL.ZOOM_NETWORK.MIRROR_DEPTHS of the configuration (default: 2 4 2; with vgg16 "
        "1 3 3)",
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


def build_zoom_network(
    bottom_up: str, mirror_depths: Sequence[int] | None, *, trainable_norm: bool
) -> ZoomNetwork:
    """A full-size zoom network over "bn_inception" or "vgg16", its weights without memory."""
    norm = "BN" if trainable_norm else "FrozenBN"
    with torch.device("meta"):
        if bottom_up == "bn_inception":
            network = BNInception(norm=norm)
            in_features = list(network.output_shape())
        else:
            # Also that of configs/zip_vgg16_detector.yaml, whose last stage has no public weights.
            norm, in_features = "", ["stage4", "stage5", "stage6"]
            network = VGG(stages=[*VGG_D, (1024,)], out_features=in_features)
        return ZoomNetwork(
            bottom_up=network,
            in_features=in_features,
            mirror_depths=mirror_depths or MIRROR_DEPTHS[bottom_up],
            norm=norm,
        )


def zoom_weights(args: argparse.Namespace, public: dict[str, torch.Tensor]) -> dict:
    """The public weights by their full names in a model on a zoom network."""
    network = build_zoom_network(
        args.architecture, args.mirror_depths, trainable_norm=args.trainable_norm
    )
    state = network.state_dict()
    if args.architecture == "vgg16":
        return convert_vgg16_zoom(
            public,
            network.bottom_up,
            state,
            pixels=args.pixels,
            pixel_std=args.pixel_std or PIXEL_STD,
        )
    weights = convert_bn_inception(
        public, fold_bias=args.trainable_norm, pixel_std=args.pixel_std or PIXEL_STD
    )
    return zoom_network_weights(weights, state)


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
    return build_model(without_trunk_weights(cfg))


def convert(args: argparse.Namespace) -> tuple[dict, bool]:
    """The public weights by this package's names, and whether these are full names of a model."""
    if args.architecture == "deepmask_r50":
        return read_released_weights(args.input), True
    public = read_weights(args.input)
    if args.zoom_network:
        return zoom_weights(args, public), True
    options = {}
    if args.architecture == "bn_inception":
        options = {"fold_bias": args.trainable_norm, "pixel_std": args.pixel_std or PIXEL_STD}
    converters = CONVERTERS | LARGEFOV_CONVERTERS | {"alexnet": convert_alexnet}
    weights = converters[args.architecture](public, **options)
    if args.architecture in LARGEFOV_CONVERTERS:
        networks = SINGLE_NETWORKS if args.single_network else SCALE_AWARE_NETWORKS
        return spop_weights(weights, networks), True
    if args.architecture == "alexnet":
        return alexnet_copies(weights, build_narrow_model(args.config_file)), True
    if args.separate_trunks:
        return deepmask_weights(weights), True
    return weights, False


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; ``arguments`` are those of the command line by default."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = build_parser()
    args = parser.parse_args(arguments)
    if args.zoom_network and args.architecture not in MIRROR_DEPTHS:
        parser.error("--zoom-network goes with --architecture bn_inception or vgg16 only")
    if args.follow_up and not args.zoom_network:
        parser.error("--follow-up goes with --zoom-network only")
    if args.separate_trunks and args.architecture != "vgg11":
        parser.error("--separate-trunks goes with --architecture vgg11 only")
    if args.pixels == "caffe" and not (args.zoom_network and args.architecture == "vgg16"):
        parser.error("--pixels caffe goes with --architecture vgg16 --zoom-network only")
    is_zip_s = args.architecture == "bn_inception" or args.zoom_network
    has_norm = args.architecture == "bn_inception" or args.follow_up is not None
    largefov = " or ".join(LARGEFOV_CONVERTERS)
    for flag, is_given, has_effect, where in (
        ("--pixel-std", args.pixel_std is not None, is_zip_s, "bn_inception or --zoom-network"),
        ("--trainable-norm", args.trainable_norm, has_norm, "bn_inception or --follow-up"),
        ("--mirror-depths", args.mirror_depths is not None, args.zoom_network, "--zoom-network"),
        (
            "--single-network",
            args.single_network,
            args.architecture in LARGEFOV_CONVERTERS,
            largefov,
        ),
    ):
        if is_given and not has_effect:
            parser.error(f"{flag} goes with {where} only")
    is_alexnet = args.architecture == "alexnet"
    if is_alexnet != (args.config_file is not None):
        parser.error("--config-file goes with --architecture alexnet, which needs it")
    try:
        weights, has_full_names = convert(args)
        if args.follow_up:
            weights |= follow_up_weights(args.follow_up, trainable_norm=args.trainable_norm)
        write_checkpoint(args.output, weights, matching_heuristics=not has_full_names)
    except (OSError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    print(f"{args.output}: {len(weights)} tensors of {args.architecture}")


if __name__ == "__main__":
    main()
