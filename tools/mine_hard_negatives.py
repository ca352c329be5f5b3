"""Mine hard negatives: windows that a trained detector takes for objects and are none (Sec. 7).

    python tools/mine_hard_negatives.py --output round_1.pkl \\
        --config-file configs/detectornet_sliding_windows_voc.yaml \\
        MODEL.WEIGHTS output/detectornet_sliding_windows_voc/model_final.pth

Runs the detector over the images of one dataset (the only one of DATASETS.TRAIN, or that of
--dataset) and writes, of its detections, those that are negative crops
(MODEL.DETECTORNET.CLASSIFIER.IOU_THRESHOLDS), as a file of proposals.
detectornet_hard_negatives_voc.yaml goes on training with it. For the second round, --add takes the
file of the first one, whose boxes stay. A stride of 5 pixels is the paper's; a coarser one
(MODEL.DETECTORNET.SLIDING_WINDOWS.STRIDE) takes less time.
"""

import argparse
import logging
import os
from collections.abc import Sequence

# Before torch is loaded: its threads would spin while they wait, which slows down whatever runs
# beside them, and themselves.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, build_detection_test_loader

from d2proposals.data.mapper import ProposalDatasetMapper
from d2proposals.detectornet.hard_negatives import hard_negatives, merge_rounds
from d2proposals.engine import check_datasets, load_trained_model
from d2proposals.engine.model_command import command_config, model_parser, running_command
from d2proposals.engine.training_records import with_training_copies
from d2proposals.files.atomic_files import check_output_file
from d2proposals.files.precomputed_format import read_proposal_file, write_proposal_file


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = model_parser(__doc__, "configuration of the detector")
    parser.add_argument("--output", required=True, help="PKL file to write")
    parser.add_argument("--dataset", help="one of DATASETS.TRAIN (default: its only one)")
    parser.add_argument("--add", metavar="PKL", help="hard negatives of an earlier round")
    parser.add_argument(
        "--top", type=int, default=87, metavar="K",
        help="of an image (default: 87; two million of two rounds, VOC 2012's 11,540 images)",
    )  # fmt: skip
    return parser


def mine(cfg: CfgNode, name: str, number: int) -> dict[int | str, tuple[np.ndarray, np.ndarray]]:
    """Hard negatives of each image of a dataset, boxes (Q, 4) and scores (Q,), by its id."""
    # With the objects that the training has, of DATASETS.CATEGORIES.
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATASETS.TRAIN = (name,)
    (copy,) = with_training_copies(cfg).DATASETS.TRAIN
    records = {x["image_id"]: x for x in DatasetCatalog.get(copy)}
    model = load_trained_model(cfg)
    max_iou = cfg.MODEL.DETECTORNET.CLASSIFIER.IOU_THRESHOLDS[0]
    # As in the test: each image once, not flipped.
    loader = build_detection_test_loader(
        list(records.values()),
        mapper=ProposalDatasetMapper(cfg, False),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )
    mined = {}
    for inputs in loader:
        with torch.no_grad():
            outputs = model(inputs)
        for input_i, output in zip(inputs, outputs, strict=True):
            image_id = input_i["image_id"]
            mined[image_id] = hard_negatives(
                output["instances"], records[image_id], max_iou, number
            )
    return mined


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; ``arguments`` are those of the command line by default."""
    parser = build_parser()
    with running_command(parser, arguments) as args:
        if args.top < 1:
            parser.error(f"--top must be at least 1, got {args.top}")
        # Detections, not proposals of another origin.
        cfg = command_config(args, "MODEL.LOAD_PROPOSALS", False)
        if cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork":
            parser.error("hard negatives are a detector's: MODEL.META_ARCHITECTURE GeneralizedRCNN")
        if not args.dataset and len(cfg.DATASETS.TRAIN) != 1:
            parser.error(
                f"hard negatives are of one dataset, DATASETS.TRAIN has {len(cfg.DATASETS.TRAIN)}: "
                "name one with --dataset, and an --output for each"
            )
        name = args.dataset or cfg.DATASETS.TRAIN[0]
        check_datasets([name])
        # Before the long work.
        check_output_file(args.output)
        earlier = read_proposal_file(args.add) if args.add else None
        mined = mine(cfg, name, args.top)
        if earlier is not None:
            for image_id, *of_image in zip(
                earlier.image_ids, earlier.boxes, earlier.objectness_logits, strict=True
            ):
                if image_id in mined:
                    mined[image_id] = merge_rounds(tuple(of_image), mined[image_id])
        if not any(len(boxes) for boxes, _ in mined.values()):
            logging.warning(
                f"no hard negative among the detections on {name}: train the detector longer, or "
                f"lower MODEL.ROI_HEADS.SCORE_THRESH_TEST ({cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST})"
            )
        boxes, scores = zip(*mined.values(), strict=True)
        write_proposal_file(args.output, list(mined), boxes, scores)
    print(f"{args.output}: {sum(map(len, boxes))} hard negatives of {len(mined)} images of {name}")


if __name__ == "__main__":
    main()
