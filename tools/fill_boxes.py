"""Replace the masks of proposals by their filled boxes: what masks add is what is lost.

    python tools/fill_boxes.py OUTPUT_DIR/inference/mask_proposals.json filled.json
    python tools/evaluate_proposals.py --dataset d2p_shapes_val \\
        --proposals masks=OUTPUT_DIR/inference/mask_proposals.json boxes=filled.json

With a model, TEST.PROPOSALS.BOXES_AS_MASKS measures its filled boxes at once.
"""

import argparse
import os
from collections.abc import Sequence

# Before torch is loaded: its threads would spin while they wait, which slows down whatever runs
# beside them, and themselves.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from d2proposals.engine import bad_input_in_one_line
from d2proposals.files.conversion import read_proposals, write_proposals
from d2proposals.files.segmentations import filled_boxes


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; ``arguments`` are those of the command line by default."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", help="file of proposals with masks")
    parser.add_argument("output", help="JSON file to write")
    args = parser.parse_args(arguments)
    with bad_input_in_one_line():
        proposals = read_proposals(args.input)
        if proposals.masks is None:
            parser.error(f"{args.input} has no masks: give the file mask_proposals.json")
        proposals.masks = [
            filled_boxes(boxes, masks[0]["size"]) if masks else []
            for boxes, masks in zip(proposals.boxes, proposals.masks, strict=True)
        ]
        write_proposals(args.output, proposals, "d2proposals")
    print(f"{args.output}: {sum(map(len, proposals.boxes))} filled boxes")


if __name__ == "__main__":
    main()
