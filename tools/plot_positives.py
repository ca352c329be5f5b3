"""Draw SC-RPN's positives per object while its initial proposals improve (Sec. III-B).

    python tools/plot_positives.py output/sc_rpn_only output/without_sads --output positives.png

Reads the training logs (metrics.json) in the output folders of runs, a curve each. With size-aware
dynamic sampling the number stays where it is; with a fixed IoU threshold it grows.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

# Before torch is loaded: its threads would spin while they wait, which slows down whatever runs
# beside them, and themselves.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from d2proposals.engine import bad_input_in_one_line
from d2proposals.sc_rpn.positives_picture import read_positives, write_positives_picture


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="OUTPUT_DIR", help="folders of trainings")
    parser.add_argument("--labels", nargs="+", metavar="NAME", help="their names in the legend")
    parser.add_argument("--output", default="positives.png", help="image file to write")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; ``arguments`` are those of the command line by default."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    labels = args.labels or [Path(run).name for run in args.runs]
    if len(set(labels)) != len(args.runs):
        parser.error(f"{len(args.runs)} runs need as many different --labels, got {labels}")
    with bad_input_in_one_line():
        runs = [read_positives(run) for run in args.runs]
        write_positives_picture(args.output, dict(zip(labels, runs, strict=True)))
    print(f"{args.output}: {', '.join(labels)}")


if __name__ == "__main__":
    main()
