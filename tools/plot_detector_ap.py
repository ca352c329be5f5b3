"""Average precision of a detector against the number of proposals that its heads see.

    python tools/plot_detector_ap.py --config-file configs/shapes/faster_rcnn_sc_rpn.yaml \\
        --limits 10 30 100 300 --name SC-RPN --output sc_rpn.json MODEL.WEIGHTS model_final.pth
    python tools/plot_detector_ap.py --config-file configs/shapes/faster_rcnn_rpn.yaml \\
        --limits 10 30 100 300 --name RPN --beside sc_rpn.json --output rpn.json MODEL.WEIGHTS r.pth

Evaluates on DATASETS.TEST once for each number: the best-scored proposals of each image go to the
heads. Writes the numbers (JSON), and the curve as a picture of the same name (PNG), with those of
other runs beside it.
"""

import argparse
import logging
import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from detectron2.utils.logger import setup_logger

from d2proposals.engine import (
    Trainer,
    bad_input_in_one_line,
    check_config,
    check_datasets,
    check_proposal_files,
    fit_to_device,
    load_config,
    load_trained_model,
)
from d2proposals.engine.detector_proposals import limited_proposals
from d2proposals.evaluation.comparison import plot_precision_by_number, read_precision_by_number
from d2proposals.proposals.atomic_files import write_json


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="configuration of the detector")
    parser.add_argument(
        "--limits", type=int, nargs="+", default=[10, 30, 100, 300, 1000], help="numbers"
    )
    parser.add_argument("--name", help="of the run (default: the configuration's)")
    parser.add_argument("--output", default="detector_ap.json", help="JSON file to write")
    parser.add_argument(
        "--beside", action="append", default=[], metavar="FILE.json", help="of another run; again"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE overrides")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; ``arguments`` are those of the command line by default."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    parser = build_parser()
    args = parser.parse_args(arguments)
    if min(args.limits) < 1:
        parser.error(f"--limits must be positive, not {min(args.limits)}")
    name = args.name or Path(args.config_file).stem
    with bad_input_in_one_line():
        runs = read_precision_by_number(args.beside)
        if name in runs:
            parser.error(f"a run beside this one is called '{name}', too: give another --name")
        cfg = load_config(args)
        fit_to_device(cfg)
        # Only detections are of interest; several numbers would write into the same files.
        cfg.TEST.PROPOSALS.OF_DETECTORS = False
        check_config(cfg)
        if len(cfg.DATASETS.TEST) != 1 or cfg.MODEL.META_ARCHITECTURE != "GeneralizedRCNN":
            parser.error(
                "takes a two-stage detector (MODEL.META_ARCHITECTURE 'GeneralizedRCNN', not "
                f"'{cfg.MODEL.META_ARCHITECTURE}') and one dataset in DATASETS.TEST, not "
                f"{len(cfg.DATASETS.TEST)}"
            )
        check_datasets(cfg.DATASETS.TEST)
        check_proposal_files(cfg)
        setup_logger(name="detectron2")
        model = load_trained_model(cfg)
        results = {}
        for limit in sorted(set(args.limits)):
            cfg.DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST = limit
            precomputed = model.proposal_generator is None
            with nullcontext() if precomputed else limited_proposals(model, limit):
                metrics = Trainer.test(cfg, model)["bbox"]
            # Without any detection, all is NaN; so are sizes and classes without objects.
            results[limit] = {"AP": 0.0, "AP50": 0.0} | {
                k: v for k, v in metrics.items() if math.isfinite(v)
            }
    content = {"name": name, "dataset": cfg.DATASETS.TEST[0], "ap_by_limit": results}
    write_json(args.output, content)
    runs[name] = {limit: metrics["AP"] for limit, metrics in results.items()}
    picture = str(Path(args.output).with_suffix(".png"))
    plot_precision_by_number(picture, runs, f"Detections on {cfg.DATASETS.TEST[0]}")
    for limit, metrics in results.items():
        print(f"{limit} proposals: AP {metrics['AP']:.2f}, AP50 {metrics['AP50']:.2f}")
    print(f"{args.output}, {picture}")


if __name__ == "__main__":
    main()
