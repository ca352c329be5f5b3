"""Masks of one trained DeepMask, scores of another: DeepMask20* (Sec. 4) as a checkpoint.

    python tools/combine_branches.py --masks output/deepmask20/model_final.pth \\
        --scores output/deepmask_rpn_only/model_final.pth combined.pth
    python train_net.py --config-file configs/deepmask_rpn_only.yaml --eval-only \\
        MODEL.WEIGHTS combined.pth MODEL.DEEPMASK.SHARED_TRUNK False \\
        OUTPUT_DIR ./output/deepmask20_star
"""

import argparse
import os
from collections.abc import Sequence

# Before torch is loaded: its threads would spin while they wait, which slows down whatever runs
# beside them, and themselves.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from d2proposals.deepmask.branch_weights import combine_branches
from d2proposals.engine import bad_input_in_one_line
from d2proposals.files.atomic_files import atomic_write
from d2proposals.files.checkpoint_file import read_model


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; ``arguments`` are those of the command line by default."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--masks", required=True, help="checkpoint of the segmentation branch")
    parser.add_argument("--scores", required=True, help="checkpoint of the scoring branch")
    parser.add_argument("output", help="checkpoint to write, ending in .pth")
    args = parser.parse_args(arguments)
    if not args.output.endswith(".pth"):
        parser.error(f"the output must end in .pth, got {args.output}")
    with bad_input_in_one_line():
        weights = combine_branches(read_model(args.masks), read_model(args.scores))
        with atomic_write(args.output, "wb") as file:
            torch.save({"model": weights}, file)
    print(f"{args.output}: {len(weights)} tensors")


if __name__ == "__main__":
    main()
