"""Write DetectorNet's windows themselves as proposals: what it would find without looking.

    python tools/write_windows.py windows.pkl --dataset d2p_shapes_val
    python tools/evaluate_proposals.py --dataset d2p_shapes_val --proposals windows=windows.pkl

The windows of all scales (Sec. 5.3) of each image, the largest first, in Detectron2's format.
"""

import argparse
import os
from collections.abc import Sequence

# Before torch is loaded: its threads would spin while they wait, which slows down whatever runs
# beside them, and themselves.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np

from d2proposals.detectornet.windows import make_windows
from d2proposals.engine import bad_input_in_one_line, check_datasets
from d2proposals.evaluation.ground_truth import load_ground_truth
from d2proposals.files.precomputed_format import write_proposal_file


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", help="PKL file to write")
    parser.add_argument("--dataset", required=True, help="registered dataset")
    parser.add_argument("--num-scales", type=int, default=3, help="default: 3, the paper's")
    parser.add_argument("--overlap", type=float, default=0.2, help="default: .2, the paper's")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; ``arguments`` are those of the command line by default."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    if args.num_scales < 1 or not 0 <= args.overlap < 1:
        parser.error("--num-scales must be at least 1 and --overlap in [0, 1)")
    with bad_input_in_one_line():
        check_datasets([args.dataset])
        images = load_ground_truth(args.dataset)
        boxes = []
        for image_id, size in zip(images.image_ids, images.image_sizes, strict=True):
            if size is None:
                parser.error(f"{args.dataset} does not say how large the image {image_id} is")
            grids = make_windows(size, args.num_scales, args.overlap)
            boxes.append(np.concatenate([grid.boxes().numpy() for grid in grids]))
        logits = [-np.arange(len(boxes_i), dtype=np.float32) for boxes_i in boxes]
        write_proposal_file(args.output, images.image_ids, boxes, logits)
    print(f"{args.output}: {sum(map(len, boxes))} windows of {len(boxes)} images")


if __name__ == "__main__":
    main()
