#!/usr/bin/env python
"""Train and evaluate region proposal generators, with the flags of Detectron2's train_net.py.

Examples:

    Train, then evaluate (needs no download):
        python train_net.py --config-file configs/shapes/rpn_only.yaml

    Go on after an interruption:
        python train_net.py --config-file configs/shapes/rpn_only.yaml --resume

    Evaluate only:
        python train_net.py --config-file configs/shapes/rpn_only.yaml --eval-only \\
            MODEL.WEIGHTS output/shapes/rpn_only/model_final.pth

    Several GPUs, or several processes on the CPU:
        python train_net.py --config-file configs/rpn_only.yaml --num-gpus 8
        python train_net.py --config-file configs/rpn_only.yaml --num-gpus 2 MODEL.DEVICE cpu
"""

import os
from argparse import Namespace
from typing import Any

# Before torch is loaded: its threads would spin while they wait, which slows down whatever runs
# beside them, and themselves.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from d2proposals.engine import (
    ProposalCheckpointer,
    Trainer,
    bad_input_in_one_line,
    check_config,
    check_datasets,
    check_evaluations,
    check_proposal_files,
    check_weights_are_whole,
    fit_to_device,
    load_config,
    load_part_weights,
    prepare_launch,
    run_processes,
    without_needless_weights,
)
from d2proposals.files.atomic_files import check_output_folder


def setup(args: Namespace) -> CfgNode:
    """Make the configuration, start the loggers and seed the generators.

    Args:
        args: of Detectron2's ``default_argument_parser``.

    Returns:
        a frozen configuration.
    """
    cfg = load_config(args)
    check_output_folder(cfg.OUTPUT_DIR)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="d2proposals")
    fit_to_device(cfg)
    check_config(cfg)
    cfg.freeze()
    default_setup(cfg, args)
    return cfg


def main(args: Namespace) -> dict[str, Any] | None:
    """Run one job: training with a last evaluation, or an evaluation alone.

    Args:
        args: of Detectron2's ``default_argument_parser``.

    Returns:
        results by dataset or task; None from processes that hold none.

    Raises:
        SystemExit: for bad input, with one line that says what to mend.
    """
    with bad_input_in_one_line():
        cfg = setup(args)
        if args.eval_only:
            return evaluate(cfg, resume=args.resume)
        check_datasets((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
        check_evaluations(cfg)
        check_proposal_files(cfg)
        trainer = Trainer(without_needless_weights(cfg, trains=True, resume=args.resume))
        trainer.resume_or_load(resume=args.resume)
        return trainer.train()


def evaluate(cfg: CfgNode, resume: bool = False) -> dict[str, Any]:
    """Evaluate a model on ``DATASETS.TEST``; with ``TEST.AUG.ENABLED`` also with augmentation.

    Args:
        cfg: a configuration; ``MODEL.WEIGHTS`` names the checkpoint.
        resume: take the last checkpoint in ``OUTPUT_DIR`` instead.

    Raises:
        SystemExit: no dataset is named.
    """
    if not cfg.DATASETS.TEST:
        raise SystemExit("Error: DATASETS.TEST is empty: name what --eval-only evaluates on.")
    check_datasets(cfg.DATASETS.TEST)
    check_evaluations(cfg, trains=False)
    check_proposal_files(cfg, train=False)
    model = Trainer.build_model(without_needless_weights(cfg, resume=resume))
    checkpointer = ProposalCheckpointer(model, save_dir=cfg.OUTPUT_DIR, save_to_disk=False)
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    load_part_weights(cfg, checkpointer, only_missing=True)
    check_weights_are_whole(checkpointer, cfg)
    results = Trainer.test(cfg, model)
    if cfg.TEST.AUG.ENABLED:
        results.update(Trainer.test_with_TTA(cfg, model))
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def invoke() -> None:
    """Run the command line, in as many processes as it asks for."""
    args = default_argument_parser().parse_args()
    with bad_input_in_one_line():
        prepare_launch(args)
    run_processes(main, args)


if __name__ == "__main__":
    invoke()
