"""Compare DetectorNet's boxes before and after the refinement, as in the paper's Fig. 4.

    python tools/compare_refinement.py --config-file configs/shapes/detectornet_rpn_only.yaml \\
        --output refinement.png MODEL.WEIGHTS output/shapes/detectornet_rpn_only/model_final.pth

Prints average precision and greatest recall of class-agnostic boxes on the first dataset of
DATASETS.TEST, at IoU thresholds .5 and .7, and draws the curves of the first.
"""

import argparse
import os
from collections.abc import Sequence

# Before torch is loaded: its threads would spin while they wait, which slows down whatever runs
# beside them, and themselves.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from detectron2.data import DatasetCatalog

from d2proposals.data.mapper import ProposalDatasetMapper
from d2proposals.detectornet import DetectorNet
from d2proposals.detectornet.refinement_curves import (
    ScoredBoxes,
    plot_precision_recall,
    precision_recall,
)
from d2proposals.engine import check_datasets, load_trained_model
from d2proposals.engine.model_command import (
    PROPOSALS_ONLY,
    command_config,
    model_parser,
    running_command,
)

IOU_THRESHOLDS = (0.5, 0.7)


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = model_parser(__doc__)
    parser.add_argument("--num-images", type=int, help="the first so many (default: all)")
    parser.add_argument("--output", default="refinement.png", help="PNG file to write")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; ``arguments`` are those of the command line by default."""
    parser = build_parser()
    with running_command(parser, arguments) as args:
        if args.num_images is not None and args.num_images < 1:
            parser.error(f"--num-images must be at least 1, got {args.num_images}")
        cfg = command_config(args, *PROPOSALS_ONLY, "MODEL.DETECTORNET.REFINEMENT.ENABLED", True)
        name = cfg.DATASETS.TEST[0]
        check_datasets([name])
        records = DatasetCatalog.get(name)[: args.num_images]
        model = load_trained_model(cfg)
        generator = model.proposal_generator
        if not isinstance(generator, DetectorNet):
            parser.error(
                f"the refinement is DetectorNet's, not {type(generator).__name__}'s: set "
                "MODEL.PROPOSAL_GENERATOR.NAME"
            )
        grids = {"first stage": None, "after refinement": generator.refinement_grid}
        boxes = {stage: [] for stage in grids}
        mapper = ProposalDatasetMapper(cfg, False)
        for record in records:
            mapped = mapper(record)
            for stage, generator.refinement_grid in grids.items():
                with torch.no_grad():
                    found = model([mapped])[0]["proposals"]
                boxes[stage].append(
                    ScoredBoxes(
                        found.proposal_boxes.tensor.cpu().numpy(),
                        found.objectness_logits.cpu().numpy(),
                    )
                )
        curves = {
            (stage, threshold): precision_recall(records, boxes[stage], threshold)
            for stage in grids
            for threshold in IOU_THRESHOLDS
        }
        plot_precision_recall(
            args.output,
            {stage: curves[stage, IOU_THRESHOLDS[0]] for stage in grids},
            f"{name}, IoU {IOU_THRESHOLDS[0]}",
        )
    for (stage, threshold), curve in curves.items():
        print(
            f"{stage}, IoU {threshold}: AP {100 * curve.average_precision:.1f}, "
            f"recall {100 * curve.greatest_recall:.1f}"
        )
    print(f"{args.output}: {len(records)} images of {name}")


if __name__ == "__main__":
    main()
