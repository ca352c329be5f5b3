"""Measure what dyTrainScale does to a training set (ZIP, Sec. 3.3 and 5.2).

    python tools/measure_training_scale.py --config-file configs/zip_rpn_only.yaml --draws 2000

Prints the pixels computed per pixel of image, and against the configuration's fixed size, with
batches as Detectron2 makes them and with batches of like sizes; and how many draws leave no
positive anchor on any level. No image is read. The rule is INPUT.DY_TRAIN_SCALE.RULE.
"""

import functools
import os
from collections.abc import Sequence

# Before torch is loaded: its threads would spin while they wait, which slows down whatever runs
# beside them, and themselves.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from detectron2.modeling import build_backbone, build_proposal_generator
from detectron2.utils.env import seed_all_rng

from d2proposals.data.mapper import ProposalDatasetMapper
from d2proposals.engine import check_datasets
from d2proposals.engine.model_command import command_config, model_parser, running_command
from d2proposals.engine.trained_model import without_trunk_weights
from d2proposals.engine.training_records import training_records, with_training_copies
from d2proposals.zip_rpn import ZIP
from d2proposals.zip_rpn.scale_measurement import (
    batches_in_order,
    batches_of_like_sizes,
    computed_per_image,
    draw_training_sizes,
    has_positives,
    pixels_per_image_pixel,
)

DRAWS, SEED = (1000, "images drawn"), (0, "of the draws")
build_parser = functools.partial(
    model_parser, __doc__, "configuration of a training of ZIP", draws=DRAWS, seed=SEED
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; ``arguments`` are those of the command line by default."""
    parser = build_parser()
    with running_command(parser, arguments) as args:
        cfg = command_config(
            args, "INPUT.DY_TRAIN_SCALE.ENABLED", True, "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""
        )
        batch_size, scale = cfg.SOLVER.IMS_PER_BATCH, cfg.INPUT.DY_TRAIN_SCALE
        least = 2 * batch_size - 1  # so many fill a batch of portraits or one of landscapes
        if args.draws < least:
            parser.error(
                f"--draws must be at least {least} for batches of {batch_size}, got {args.draws}"
            )
        check_datasets(cfg.DATASETS.TRAIN)
        with torch.device("meta"):  # its maps' shapes are all that is needed
            shapes = build_backbone(without_trunk_weights(cfg)).output_shape()
        generator = build_proposal_generator(cfg, shapes)
        if not isinstance(generator, ZIP):
            parser.error(f"dyTrainScale is ZIP's, the configuration has {type(generator).__name__}")
        seed_all_rng(args.seed)
        records = training_records(with_training_copies(cfg))
        drawn, fixed = draw_training_sizes(records, ProposalDatasetMapper(cfg, True), args.draws)
        sizes = [draw.size for draw in drawn]
        usual = computed_per_image(batches_in_order([draw.size for draw in fixed], batch_size))
        batches = {
            "batches as they come": batches_in_order(sizes, batch_size),
            "batches of like sizes": batches_of_like_sizes(
                sizes, batch_size, scale.GROUPED_BATCHES
            ),
        }
        without = sum(not has_positives(generator, draw) for draw in drawn)
    print(f"{len(records)} images, {args.draws} draws, rule {scale.RULE}, batches of {batch_size}")
    for name, batches_i in batches.items():
        print(
            f"{name}: {pixels_per_image_pixel(batches_i):.2f} pixels computed per pixel of image, "
            f"{computed_per_image(batches_i) / usual:.2f} of a fixed size's"
        )
    print(f"draws without a positive anchor: {100 * without / args.draws:.1f} %")


if __name__ == "__main__":
    main()
