"""Average precision of a detector against the number of proposals that its heads see.

    python tools/plot_detector_ap.py --config-file configs/shapes/faster_rcnn_sc_rpn.yaml \\
        --limits 10 30 100 300 --name SC-RPN --output sc_rpn.json MODEL.WEIGHTS model_final.pth
    python tools/plot_detector_ap.py --config-file configs/shapes/faster_rcnn_rpn.yaml \\
        --limits 10 30 100 300 --name RPN --beside sc_rpn.json --output rpn.json MODEL.WEIGHTS r.pth

Evaluates on DATASETS.TEST once for each number: the best-scored proposals of each image go to the
heads, as far as there are so many; the mean number that they got stands beside each result. Writes
the numbers (JSON), and the curve as a picture of the same name (PNG), with those of other runs
beside it.
"""

import argparse
import logging
import math
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

# Before torch is loaded: its threads would spin while they wait, which slows down whatever runs
# beside them, and themselves.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from detectron2.config import CfgNode
from detectron2.utils.logger import setup_logger
from torch import nn

from d2proposals.engine import (
    Trainer,
    check_datasets,
    check_proposal_files,
    is_two_stage,
    load_trained_model,
)
from d2proposals.engine.detector_proposals import (
    ProposalCounter,
    counted_proposals,
    limited_proposals,
)
from d2proposals.engine.model_command import (
    command_config,
    model_parser,
    running_command,
)
from d2proposals.evaluation.comparison import plot_precision_by_number, read_precision_by_number
from d2proposals.files.atomic_files import check_output_folder, write_json

logger = logging.getLogger("d2proposals.plot_detector_ap")


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = model_parser(__doc__, "configuration of the detector")
    parser.add_argument(
        "--limits", type=int, nargs="+", default=[10, 30, 100, 300, 1000], help="numbers"
    )
    parser.add_argument(
        "--measure",
        choices=("AP", "AP50"),
        default="AP",
        help="what is drawn: the mean over IoU .5 to .95 (default), or AP at IoU .5, PASCAL VOC's",
    )
    parser.add_argument("--name", help="of the run (default: the configuration's)")
    parser.add_argument("--output", default="detector_ap.json", help="JSON file to write")
    parser.add_argument(
        "--beside", action="append", default=[], metavar="FILE.json", help="of another run; again"
    )
    return parser


def evaluate_at(
    cfg: CfgNode, model: nn.Module, limit: int
) -> tuple[dict[str, float], ProposalCounter]:
    """Evaluate a detector whose heads get at most ``limit`` proposals of an image.

    Args:
        cfg: a configuration, in which the limit of precomputed proposals is set.
        model: of this configuration.
        limit: at least 1.

    Returns:
        measures in percent, and the count of the proposals that the heads got.
    """
    cfg.DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST = limit
    precomputed = model.proposal_generator is None
    with nullcontext() if precomputed else limited_proposals(model, limit):
        with counted_proposals(model) as counter:
            metrics = Trainer.test(cfg, model)["bbox"]
    if counter.largest < limit:
        logger.warning(
            f"No image has {limit} proposals, the most are {counter.largest}: this point is that "
            "of fewer proposals. Lower --limits, or let "
            f"{'the files have' if precomputed else 'the generator yield'} more."
        )
    # Without any detection, all is NaN; so are sizes and classes without objects.
    finite = {k: v for k, v in metrics.items() if math.isfinite(v)}
    return {"AP": 0.0, "AP50": 0.0} | finite, counter


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; ``arguments`` are those of the command line by default."""
    parser = build_parser()
    with running_command(parser, arguments) as args:
        if min(args.limits) < 1:
            parser.error(f"--limits must be positive, not {min(args.limits)}")
        name = args.name or Path(args.config_file).stem
        check_output_folder(Path(args.output).parent)
        runs = read_precision_by_number(args.beside, args.measure)
        if name in runs:
            parser.error(f"a run beside this one is called '{name}', too: give another --name")
        # Only detections are of interest; several numbers would write into the same files.
        cfg = command_config(args, "TEST.PROPOSALS.OF_DETECTORS", False)
        if not is_two_stage(cfg):
            parser.error(
                "takes a two-stage detector: MODEL.META_ARCHITECTURE 'GeneralizedRCNN' or one of "
                f"its kind, not '{cfg.MODEL.META_ARCHITECTURE}' (a generator alone has no AP)"
            )
        if len(cfg.DATASETS.TEST) != 1:
            parser.error(f"takes one dataset in DATASETS.TEST, not {len(cfg.DATASETS.TEST)}")
        check_datasets(cfg.DATASETS.TEST)
        check_proposal_files(cfg, train=False)
        setup_logger(name="detectron2")
        model = load_trained_model(cfg)
        results, numbers = {}, {}
        for limit in sorted(set(args.limits)):
            results[limit], counter = evaluate_at(cfg, model, limit)
            numbers[limit] = counter.mean
    for limit, metrics in results.items():
        print(
            f"{limit} proposals: AP {metrics['AP']:.2f}, AP50 {metrics['AP50']:.2f}, "
            f"{numbers[limit]:.1f} proposals per image"
        )
    content = {"name": name, "dataset": cfg.DATASETS.TEST[0], "ap_by_limit": results}
    write_json(args.output, {**content, "mean_number_by_limit": numbers})
    runs[name] = {limit: metrics[args.measure] for limit, metrics in results.items()}
    picture = str(Path(args.output).with_suffix(".png"))
    title = f"Detections on {cfg.DATASETS.TEST[0]}"
    plot_precision_by_number(picture, runs, title, args.measure)
    print(f"{args.output}, {picture}")


if __name__ == "__main__":
    main()
