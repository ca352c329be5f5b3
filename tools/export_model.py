"""Write a trained model to a file that runs without Python packages of this project: TorchScript
(torch.jit.load, libtorch) or ONNX (onnxruntime and other hosts).

    python tools/export_model.py --config-file configs/shapes/sc_rpn_only.yaml --format onnx \\
        --output sc_rpn.onnx MODEL.WEIGHTS output/shapes/sc_rpn_only/model_final.pth
    python tools/export_model.py --config-file configs/shapes/sc_rpn_only.yaml \\
        --format torchscript --check photo.jpg --output sc_rpn.ts MODEL.WEIGHTS model_final.pth

In: "image", (3, H, W) float32 in [0, 255], in the colours of INPUT.FORMAT, resized as for the test,
of any H and W. Out: "boxes" (R, 4), XYXY in its pixels, "scores" (R,) and, of detectors, "classes"
(R,), in the order of the evaluation. The file repeats that (docs/deploy.md). ONNX takes the
packages onnx and onnxruntime.
"""

import argparse
import os
import time
from collections.abc import Sequence

# Before torch is loaded: its threads would spin while they wait, which slows down whatever runs
# beside them, and themselves.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from tabulate import tabulate

from d2proposals.deployment.comparison import (
    BOX_TOLERANCE,
    SCORE_TOLERANCE,
    Differences,
    compare_outputs,
)
from d2proposals.deployment.exported_files import (
    WRITERS,
    contract_of,
    load_onnx,
    load_torchscript,
)
from d2proposals.deployment.image_network import ImageFunction, ImageNetwork
from d2proposals.engine import load_trained_model, network_input_of
from d2proposals.engine.model_command import command_config, model_parser, running_command
from d2proposals.files.image_files import read_rgb_image

ROUNDS = 3


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = model_parser(__doc__)
    parser.add_argument("--format", required=True, choices=sorted(WRITERS), help="of the file")
    parser.add_argument("--output", required=True, metavar="FILE", help="to write")
    parser.add_argument(
        "--check",
        nargs="+",
        default=[],
        metavar="IMAGE",
        help="image files on which the written network is compared with the model",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; ``arguments`` are those of the command line by default."""
    with running_command(build_parser(), arguments) as args:
        # A compiled part has no trace, and files have layouts of their hosts.
        as_built = ("MODEL.EXECUTION.COMPILE", (), "MODEL.EXECUTION.MEMORY_FORMAT", "contiguous")
        cfg = command_config(args, *as_built)
        images = {path: read_rgb_image(path) for path in args.check}
        network = ImageNetwork(load_trained_model(cfg))
        WRITERS[args.format](network, args.output, contract_of(network, cfg))
        print(f"{args.output}: {args.format}, {os.path.getsize(args.output) / 2**20:.1f} MiB")
        if not images:
            return
        network_input = network_input_of(cfg)
        inputs = {path: network_input(image).float() for path, image in images.items()}
        exported = load_exported(args.format, args.output)
        is_equal = print_check(network, exported, inputs, args.format)
    if not is_equal:
        raise SystemExit("The exported network does not find the same boxes.")


def load_exported(file_format: str, path: str) -> ImageFunction:
    """The network of a file; ONNX with as many threads as torch has."""
    if file_format == "onnx":
        return load_onnx(path, torch.get_num_threads())
    return load_torchscript(path)


def print_check(
    network: ImageNetwork,
    exported: ImageFunction,
    inputs: dict[str, torch.Tensor],
    label: str,
) -> bool:
    """Print differences and times of each image; whether all have the same boxes.

    Args:
        network: the model.
        exported: the network of the file.
        inputs: by name, (3, H, W).
        label: of the exported network's times.
    """
    rows, is_equal, num_boxes = [], True, 0
    device = network.model.device
    for path, image in inputs.items():
        image = image.to(device)
        differences = compare_outputs(network(image), exported(image))
        is_equal &= differences.is_equal
        num_boxes += sum(differences.num_boxes)
        seconds = fastest_in_turn([network, exported], image)
        rows.append(row_of(path, image, differences, seconds))
    headers = ["image", "size", "boxes", "unmatched (ties)", "box (px)", "score", "misplaced"]
    print(tabulate(rows, [*headers, "model (s)", f"{label} (s)"], disable_numparse=True))
    print(
        f"Counted as the same: boxes to {BOX_TOLERANCE:g} px, scores to {SCORE_TOLERANCE:g}. "
        f"Times: the fastest of {ROUNDS} rounds, {torch.get_num_threads()} threads, {device}."
    )
    if not num_boxes:
        print(
            "No boxes in these images: nothing was compared. Name other images, or lower the "
            "least score (of detectors MODEL.ROI_HEADS.SCORE_THRESH_TEST)."
        )
    return is_equal


def row_of(
    path: str, image: torch.Tensor, differences: Differences, seconds: Sequence[float]
) -> list[str]:
    """A row of the table."""
    height, width = image.shape[-2:]
    return [
        os.path.basename(path),
        f"{height}x{width}",
        "{} / {}".format(*differences.num_boxes),
        f"{differences.num_unmatched} ({differences.num_cut})",
        f"{differences.box:.1e}",
        f"{differences.score:.1e}",
        str(differences.num_misplaced),
        *(f"{x:.4f}" for x in seconds),
    ]


def fastest_in_turn(networks: Sequence[ImageFunction], image: torch.Tensor) -> list[float]:
    """Seconds of each network, the fastest of ``ROUNDS``, in turn after a round of warming up."""
    seconds = [[] for _ in networks]
    for round_ in range(-1, ROUNDS):
        for network, own in zip(networks, seconds, strict=True):
            start = time.perf_counter()
            network(image)
            if image.is_cuda:
                torch.cuda.synchronize(image.device)
            if round_ >= 0:
                own.append(time.perf_counter() - start)
    return [min(own) for own in seconds]


if __name__ == "__main__":
    main()
