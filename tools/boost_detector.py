"""Fit AdaBoost to the block features of a trained ZIP detector (Sec. 4, "feature boosting").

    python tools/boost_detector.py --config-file configs/zip_detector.yaml --output boosting.npz \\
        MODEL.WEIGHTS output/zip_detector/model_final.pth
    python train_net.py --config-file configs/zip_detector.yaml --eval-only \\
        MODEL.WEIGHTS output/zip_detector/model_final.pth \\
        MODEL.ZIP_DETECTOR.BOOSTING_FILE boosting.npz

RoIs are sampled from the images of DATASETS.TRAIN, in random order, at the sizes of the training.
Needs scikit-learn (1.6 or newer). 20,000 RoIs of the full-size network take 1 GB.
"""

import argparse
import logging
import math
import os
import random
from collections.abc import Sequence

# Before torch is loaded: its threads would spin while they wait, which slows down whatever runs
# beside them, and themselves.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from detectron2.data import build_detection_test_loader
from detectron2.utils.env import seed_all_rng
from tqdm import tqdm

from d2proposals.data.mapper import ProposalDatasetMapper
from d2proposals.engine import check_datasets, load_trained_model
from d2proposals.engine.model_command import (
    command_config,
    model_parser,
    running_command,
)
from d2proposals.engine.training_records import training_records, with_training_copies
from d2proposals.files.atomic_files import check_output_file
from d2proposals.zip_rpn.boosting import (
    check_scikit_learn,
    fit_boosted_trees,
    save_boosted_trees,
)
from d2proposals.zip_rpn.boosting_samples import check_boostable, collect_block_features


def positive_int(text: str) -> int:
    """An argument that must be a positive whole number."""
    number = int(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"must be positive, got {number}")
    return number


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = model_parser(__doc__, "configuration of the detector")
    parser.add_argument("--output", default="boosting.npz", help="file to write")
    for name, default, text in (
        ("--max-rois", 20000, "samples in all, at most"),
        ("--rois-per-image", 32, "samples of one image, at most"),
        ("--num-estimators", 200, "trees, at most"),
        ("--max-depth", 4, "of each tree"),
    ):
        parser.add_argument(
            name, type=positive_int, default=default, help=f"{text} (default: {default})"
        )
    parser.add_argument(
        "--max-features",
        type=positive_int,
        help="features that each decision chooses from, drawn at random (default: the square root "
        "of their number). 200 trees for 20,000 RoIs of 12,288 features take 5 minutes of one CPU "
        "core with 110, the default, and 5 hours with all",
    )
    parser.add_argument("--seed", type=int, default=0, help="of all draws (default: 0)")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; ``arguments`` are those of the command line by default."""
    parser = build_parser()
    with running_command(parser, arguments, logging.INFO) as args:
        # The file is what is about to be fitted.
        cfg = command_config(args, "MODEL.ZIP_DETECTOR.BOOSTING_FILE", "")
        if not cfg.MODEL.WEIGHTS:
            parser.error("name the trained detector's checkpoint in MODEL.WEIGHTS")
        check_scikit_learn()
        check_output_file(args.output)
        check_datasets(cfg.DATASETS.TRAIN)
        seed_all_rng(args.seed)
        model = load_trained_model(cfg)
        check_boostable(model)
        records = training_records(with_training_copies(cfg))
        random.Random(args.seed).shuffle(records)
        loader = build_detection_test_loader(
            records,
            mapper=ProposalDatasetMapper(cfg, True),
            num_workers=cfg.DATALOADER.NUM_WORKERS,
        )
        features, labels = collect_block_features(
            model,
            tqdm(loader, desc="images", disable=None),
            rois_per_image=args.rois_per_image,
            max_rois=args.max_rois,
        )
        num_features = features.shape[1]
        max_features = min(args.max_features or math.isqrt(num_features), num_features)
        print(
            f"Fitting {args.num_estimators} trees to {len(labels)} RoIs of {num_features} "
            f"features, each decision to {max_features} of them"
        )
        arrays = fit_boosted_trees(
            features,
            labels,
            cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            num_estimators=args.num_estimators,
            max_depth=args.max_depth,
            max_features=max_features,
            seed=args.seed,
        )
        save_boosted_trees(args.output, arrays)
    print(f"{args.output}: {len(arrays['weights'])} trees")


if __name__ == "__main__":
    main()
