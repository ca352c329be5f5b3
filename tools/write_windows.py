"""Write windows themselves as proposals: what is found without looking.

    python tools/write_windows.py windows.pkl --dataset d2p_shapes_val
    python tools/evaluate_proposals.py --dataset d2p_shapes_val --proposals windows=windows.pkl
    python tools/write_windows.py sliding.pkl --dataset d2p_shapes_val --sliding --stride 40

DetectorNet's windows of all scales (Sec. 5.3) of each image, or with --sliding those of the
sliding-window baseline (Sec. 7), the largest first, in Detectron2's format. In full, at a stride of
5 pixels, the latter are about 150,000 of an image, 3 MB: configurations with the generator
SlidingWindows make them as they go.
"""

import argparse
import os
from collections.abc import Sequence

# Before torch is loaded: its threads would spin while they wait, which slows down whatever runs
# beside them, and themselves.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
from detectron2.config import get_cfg

from d2proposals.config import add_d2proposals_config
from d2proposals.detectornet.sliding_windows import SlidingGrid
from d2proposals.detectornet.windows import make_windows
from d2proposals.engine import bad_input_in_one_line
from d2proposals.engine.dataset_source import add_dataset_source, named_datasets
from d2proposals.evaluation.ground_truth import load_ground_truth
from d2proposals.files.precomputed_format import write_proposal_file


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", help="PKL file to write")
    add_dataset_source(parser)
    parser.add_argument("--num-scales", type=int, default=3, help="default: 3, the paper's")
    parser.add_argument("--overlap", type=float, default=0.2, help="default: .2, the paper's")
    parser.add_argument("--sliding", action="store_true", help="the baseline's windows instead")
    parser.add_argument("--stride", type=float, default=5.0, help="of these (default: 5)")
    return parser


def windows_of(image_size: tuple[int, int], args: argparse.Namespace) -> np.ndarray:
    """(R, 4) XYXY windows of an image, in pixels, the largest first."""
    if args.sliding:
        cfg = get_cfg()
        add_d2proposals_config(cfg)
        cfg.MODEL.DETECTORNET.SLIDING_WINDOWS.STRIDE = args.stride
        return SlidingGrid.from_config(cfg).windows(image_size).numpy()
    grids = make_windows(image_size, args.num_scales, args.overlap)
    return np.concatenate([grid.boxes().numpy() for grid in grids])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; ``arguments`` are those of the command line by default."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    if args.num_scales < 1 or not 0 <= args.overlap < 1:
        parser.error("--num-scales must be at least 1 and --overlap in [0, 1)")
    if not 0 < args.stride < float("inf"):
        parser.error(f"--stride must be a positive number of pixels, got {args.stride}")
    with bad_input_in_one_line():
        (dataset,) = named_datasets(args)
        images = load_ground_truth(dataset)
        boxes = []
        for image_id, size in zip(images.image_ids, images.image_sizes, strict=True):
            if size is None:
                parser.error(f"{dataset} does not say how large the image {image_id} is")
            boxes.append(windows_of(size, args))
        logits = [-np.arange(len(boxes_i), dtype=np.float32) for boxes_i in boxes]
        write_proposal_file(args.output, images.image_ids, boxes, logits)
    print(f"{args.output}: {sum(map(len, boxes))} windows of {len(boxes)} images")


if __name__ == "__main__":
    main()
