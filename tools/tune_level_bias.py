"""Tune MODEL.ZIP.LEVEL_BIAS on a validation set (ZIP, Sec. 3.4).

    python tools/tune_level_bias.py --config-file configs/zip_rpn_only.yaml \\
        --dataset my_small_set MODEL.WEIGHTS output/zip_rpn_only/model_final.pth

The set should be another one than that of the evaluation, as in the paper. The network runs over it
once, at the scales of TEST.AUG where that is enabled; then the biases that give the highest
average recall are searched for. Prints them as an override.
"""

import argparse
import os
from collections.abc import Sequence

# Before torch is loaded: its threads would spin while they wait, which slows down whatever runs
# beside them, and themselves.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from d2proposals.data.mapper import ProposalDatasetMapper
from d2proposals.engine import ProposalNetworkWithTTA, load_trained_model, without_test_resize
from d2proposals.engine.checked_datasets import records_to_test
from d2proposals.engine.model_command import (
    PROPOSALS_ONLY,
    command_config,
    dataset_of,
    model_parser,
    running_command,
)
from d2proposals.evaluation.ground_truth import load_ground_truth
from d2proposals.evaluation.recall import check_limits
from d2proposals.zip_rpn import ZIP
from d2proposals.zip_rpn.level_bias import recall_with_bias, recorded_candidates, tune_level_bias


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = model_parser(__doc__)
    parser.add_argument("--dataset", required=True, help="registered validation set")
    parser.add_argument(
        "--limit", type=int, default=100, help="maximise AR of so many proposals (default: 100)"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; ``arguments`` are those of the command line by default."""
    parser = build_parser()
    with running_command(parser, arguments) as args:
        (limit,) = check_limits([args.limit])
        cfg = command_config(args, *PROPOSALS_ONLY, "MODEL.ZIP.POST_NMS_TOPK_TEST", limit)
        if not cfg.TEST.AUG.ENABLED:
            cfg.TEST.AUG.MIN_SIZES = (cfg.INPUT.MIN_SIZE_TEST,)
            cfg.TEST.AUG.MAX_SIZE, cfg.TEST.AUG.FLIP = cfg.INPUT.MAX_SIZE_TEST, False
        name = dataset_of(args, cfg, parser)
        ground_truth = load_ground_truth(name)
        if not len(ground_truth.boxes):
            parser.error(f"{name} has no objects to measure recall of")
        model = load_trained_model(cfg)
        generator = model.proposal_generator
        if not isinstance(generator, ZIP):
            parser.error(f"LEVEL_BIAS is ZIP's, the model has {type(generator).__name__}")
        network, mapper = (
            ProposalNetworkWithTTA(cfg, model),
            ProposalDatasetMapper(without_test_resize(cfg), False),
        )
        with recorded_candidates(generator) as records, torch.no_grad():
            for record in records_to_test(cfg, name):
                network([mapper(record)])
        tried: dict[tuple[float, ...], float] = {}

        def evaluate(bias: tuple[float, ...]) -> float:
            if bias not in tried:
                tried[bias] = recall_with_bias(generator, records, ground_truth, bias, limit)
                print(f"{bias}: AR@{limit} {100 * tried[bias]:.2f}", flush=True)
            return tried[bias]

        num_levels = len(generator.in_features)
        bias, best = tune_level_bias(evaluate, num_levels)
        plain = tried[(0.0,) * num_levels]
    print(f"{len(records)} images of {name}: AR@{limit} {100 * plain:.2f} -> {100 * best:.2f}")
    print(f'MODEL.ZIP.LEVEL_BIAS "{bias}"')


if __name__ == "__main__":
    main()
