"""Train and evaluate a lazy configuration (a .py file), with the flags of Detectron2's
lazyconfig_train_net.py.

    python tools/train_lazy.py --config-file configs/lazy/sc_rpn_only.py
    python tools/train_lazy.py --config-file configs/lazy/sc_rpn_only.py --resume
    python tools/train_lazy.py --config-file configs/lazy/sc_rpn_only.py --eval-only \\
        train.init_checkpoint=output/lazy/sc_rpn_only/model_final.pth
    python tools/train_lazy.py --config-file configs/lazy/vitdet_sc_rpn.py --num-gpus 8

Overrides are KEY=VALUE, e.g. dataloader.train.dataset.names=d2p_shapes_train; +KEY=VALUE adds a key
that the file leaves at its default. The evaluation is by average recall; of detectors, their
proposals and their detections.
"""

import os
from argparse import Namespace
from typing import Any

# Before torch is loaded: its threads would spin while they wait, which slows down whatever runs
# beside them, and themselves.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from detectron2.engine import default_argument_parser, default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from d2proposals.engine import bad_input_in_one_line, check_weights_are_whole, run_processes
from d2proposals.engine.lazy_training import (
    LazyCheckpointer,
    build_lazy_model,
    evaluate_lazy,
    fit_lazy_config_to_device,
    load_lazy_config,
    prepare_lazy_launch,
    train_lazy,
)
from d2proposals.files.atomic_files import check_output_folder


def main(args: Namespace) -> dict[str, Any]:
    """Run one job; ``args`` of Detectron2's ``default_argument_parser``."""
    with bad_input_in_one_line():
        cfg = load_lazy_config(args)
        check_output_folder(cfg.train.output_dir)
        rank = comm.get_rank()
        setup_logger(cfg.train.output_dir, distributed_rank=rank, name="d2proposals")
        fit_lazy_config_to_device(cfg)
        default_setup(cfg, args)
        if not args.eval_only:
            return train_lazy(cfg, resume=args.resume)
        model = build_lazy_model(cfg)
        checkpointer = LazyCheckpointer(model)
        checkpointer.load(cfg.train.init_checkpoint)
        check_weights_are_whole(checkpointer)
        return evaluate_lazy(cfg, model)


def invoke() -> None:
    """Run the command line, in as many processes as it asks for."""
    args = default_argument_parser(__doc__).parse_args()
    with bad_input_in_one_line():
        prepare_lazy_launch(args)
    run_processes(main, args)


if __name__ == "__main__":
    invoke()
