"""Compare DetectorNet's boxes before and after the refinement, as in the paper's Fig. 4.

    python tools/compare_refinement.py --config-file configs/shapes/detectornet_rpn_only.yaml \\
        --output refinement.png MODEL.WEIGHTS output/shapes/detectornet_rpn_only/model_final.pth

Prints average precision and greatest recall on the first dataset of DATASETS.TEST, at IoU
thresholds .5 and .7, and draws the curves of the first; difficult objects and crowds are neither
right nor wrong. Both stages are detections, as those of
DetectorNetHeads: duplicates of a class are suppressed (MODEL.ROI_HEADS.NMS_THRESH_TEST). With masks
of each class (MODEL.DETECTORNET.CLASS_AGNOSTIC False) every class has its figures and its panel,
and the mean stands last; class-agnostic boxes are compared with objects of all classes as one.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from typing import Any

# Before torch is loaded: its threads would spin while they wait, which slows down whatever runs
# beside them, and themselves.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from torch import nn

from d2proposals.data.dataset_reading import read_dataset
from d2proposals.data.mapper import ProposalDatasetMapper
from d2proposals.detectornet import DetectorNet
from d2proposals.detectornet.refinement_curves import (
    PrecisionRecall,
    ScoredBoxes,
    detections_of,
    plot_precision_recall,
    precision_recall,
)
from d2proposals.engine import check_datasets, load_trained_model
from d2proposals.engine.checked_datasets import checked_dataset, records_to_test
from d2proposals.engine.model_command import (
    PROPOSALS_ONLY,
    command_config,
    model_parser,
    running_command,
)
from d2proposals.evaluation.voc_evaluator import objects_of
from d2proposals.files.atomic_files import check_output_file

IOU_THRESHOLDS = (0.5, 0.7)
ALL_CLASSES = "all classes as one"
# Curves by stage, IoU threshold and class.
Curves = dict[tuple[str, float], dict[int, PrecisionRecall]]


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
        check_output_file(args.output)
        cfg = command_config(args, *PROPOSALS_ONLY, "MODEL.DETECTORNET.REFINEMENT.ENABLED", True)
        name = cfg.DATASETS.TEST[0]
        check_datasets([name])
        records = records_to_test(cfg, name)[: args.num_images]
        by_image = objects_of(read_dataset(checked_dataset(cfg, name, "TEST")))
        objects = [by_image[str(record["image_id"])] for record in records]
        model = load_trained_model(cfg)
        generator = model.proposal_generator
        if not isinstance(generator, DetectorNet):
            parser.error(
                f"the refinement is DetectorNet's, not {type(generator).__name__}'s: set "
                "MODEL.PROPOSAL_GENERATOR.NAME"
            )
        boxes = detect_both(model, ProposalDatasetMapper(cfg, False), records,
                            cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST)  # fmt: skip
        agnostic = not generator.predicts_classes
        curves = {
            (stage, threshold): precision_recall(objects, found, threshold, class_agnostic=agnostic)
            for stage, found in boxes.items()
            for threshold in IOU_THRESHOLDS
        }
        names = MetadataCatalog.get(name).get("thing_classes", [])
        titles = {
            class_id: ALL_CLASSES if agnostic else names[class_id]
            for class_id in curves[next(iter(boxes)), IOU_THRESHOLDS[0]]
        }
        print("\n".join(report(curves, titles)))
        plot_precision_recall(
            args.output,
            {
                f"{title}, IoU {IOU_THRESHOLDS[0]}": {
                    stage: curves[stage, IOU_THRESHOLDS[0]][class_id] for stage in boxes
                }
                for class_id, title in titles.items()
            },
        )
    print(f"{args.output}: {len(records)} images of {name}")


def detect_both(
    model: nn.Module,
    mapper: ProposalDatasetMapper,
    records: Sequence[Mapping[str, Any]],
    nms_thresh: float,
) -> dict[str, list[ScoredBoxes]]:
    """Detections of each image after each stage.

    Args:
        model: with the generator DetectorNet, which refines.
        mapper: of the test.
        records: dictionaries of Detectron2's dataset format.
        nms_thresh: of the heads' suppression.
    """
    generator = model.proposal_generator
    grids = {"first stage": None, "after refinement": generator.refinement_grid}
    boxes = {stage: [] for stage in grids}
    for record in records:
        mapped = mapper(record)
        for stage, generator.refinement_grid in grids.items():
            with torch.no_grad():
                found = model([mapped])[0]["proposals"]
            boxes[stage].append(detections_of(found, nms_thresh))
    return boxes


def report(curves: Curves, titles: Mapping[int, str]) -> list[str]:
    """A line for each class, stage and threshold; with several classes, their means last."""
    lines = []
    for (stage, threshold), of_classes in curves.items():
        figures = [
            (titles[class_id], x.average_precision, x.greatest_recall)
            for class_id, x in of_classes.items()
        ]
        if len(figures) > 1:
            figures.append(("mean", *np.mean([x[1:] for x in figures], axis=0)))
        lines += [
            f"{stage}, IoU {threshold}, {title}: AP {100 * average:.1f}, recall {100 * recall:.1f}"
            for title, average, recall in figures
        ]
    return lines


if __name__ == "__main__":
    main()
