"""Draw the masks of the best proposals on images of a dataset.

    python tools/visualize_masks.py --config-file configs/shapes/deepmask_rpn_only.yaml \\
        --output masks.png MODEL.WEIGHTS output/shapes/deepmask_rpn_only/model_final.pth

Of each object the mask with the highest IoU among the best proposals is drawn; objects without a
mask above --iou have a red outline (as in DeepMask, Fig. 3). With --best N, the N best-scored masks
are drawn instead, whatever they show.
"""

import argparse
import os
from collections.abc import Sequence

# Before torch is loaded: its threads would spin while they wait, which slows down whatever runs
# beside them, and themselves.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from matplotlib.figure import Figure

from d2proposals.data.mapper import ProposalDatasetMapper
from d2proposals.deepmask.mask_pictures import draw_image
from d2proposals.engine import load_trained_model
from d2proposals.engine.checked_datasets import records_to_test
from d2proposals.engine.model_command import (
    PROPOSALS_ONLY,
    command_config,
    dataset_of,
    model_parser,
    running_command,
)
from d2proposals.files.figure_file import write_figure
from d2proposals.pictures.coverage import spread_evenly

_COLUMNS = 4


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = model_parser(__doc__)
    parser.add_argument("--dataset", help="registered dataset (default: first of DATASETS.TEST)")
    parser.add_argument("--num-images", type=int, default=8, help="evenly spread (default: 8)")
    parser.add_argument("--top", type=int, default=100, help="best proposals (default: 100)")
    parser.add_argument("--iou", type=float, default=0.5, help="IoU of a found object")
    parser.add_argument(
        "--best", type=int, default=0, help="draw so many best-scored masks instead"
    )
    parser.add_argument("--output", default="masks.png", help="PNG file to write")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; ``arguments`` are those of the command line by default."""
    parser = build_parser()
    with running_command(parser, arguments) as args:
        cfg = command_config(args, *PROPOSALS_ONLY)
        dataset = dataset_of(args, cfg, parser)
        records = records_to_test(cfg, dataset)
        chosen = [records[index] for index in spread_evenly(args.num_images, len(records))]
        model = load_trained_model(cfg)
        mapper = ProposalDatasetMapper(cfg, False)
        columns = min(_COLUMNS, len(chosen))
        rows = -(-len(chosen) // columns)
        figure = Figure(figsize=(3 * columns, 3 * rows), dpi=110, layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).flatten()
        found = total = 0
        for axes, record in zip(panels, chosen, strict=False):
            with torch.no_grad():
                proposals = model([mapper(record)])[0]["proposals"]
            found_i, total_i = draw_image(
                axes, record, proposals, top=args.top, iou_threshold=args.iou, best=args.best
            )
            found, total = found + found_i, total + total_i
        for axes in panels[len(chosen) :]:
            axes.set_axis_off()
        write_figure(args.output, figure)
    summary = f", {found} of {total} objects found" if total else ""
    print(f"{args.output}: {len(chosen)} images of {dataset}{summary}")


if __name__ == "__main__":
    main()
