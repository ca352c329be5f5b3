"""Measure class-agnostic proposals of any origin: files in, recall out; no model, no configuration.

    python tools/evaluate_proposals.py --dataset coco_2017_val --proposals box_proposals.pkl
    python tools/evaluate_proposals.py --gt annotations.json \\
        --proposals ours=a.json theirs=b.pkl --output comparison

Known formats, told by their content: Detectron2's precomputed proposals, COCO's results (boxes or
run-length encodings), mmdetection's dumped proposals, Segment-Anything's automatic masks, own
files. What looks wrong with a file or the annotations is named; --strict makes it an error. The
measures are those of the evaluation during training (docs/evaluation.md).
"""

import argparse
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence

# Before torch is loaded: its threads would spin while they wait, which slows down whatever runs
# beside them, and themselves.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np

from d2proposals.engine import bad_input_in_one_line
from d2proposals.engine.dataset_source import add_dataset_source, named_datasets
from d2proposals.evaluation.comparison import compare_table, plot_comparison, write_csv
from d2proposals.evaluation.ground_truth import GroundTruth, load_ground_truth
from d2proposals.evaluation.measurement import (
    Measurement,
    box_overlaps_of,
    mask_overlaps_of,
    measure,
    num_needed,
)
from d2proposals.evaluation.proposal_runs import ProposalRun, name_runs, read_run
from d2proposals.evaluation.recall import check_limits, describe_idle_limits
from d2proposals.evaluation.unseen_categories import choose_unseen
from d2proposals.files.atomic_files import check_output_folder, write_json
from d2proposals.files.figure_file import beside_numbers

# Seconds between two lines of progress.
_PROGRESS_PERIOD = 5.0


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_dataset_source(parser)
    parser.add_argument(
        "--proposals",
        nargs="+",
        required=True,
        metavar="[NAME=]PATH",
        help="files (Segment-Anything: folders) of proposals; NAME stands for it in the results",
    )
    parser.add_argument(
        "--leave-out-difficult",
        action="store_true",
        help="objects marked 'difficult' do not count (default: they do)",
    )
    parser.add_argument(
        "--kind", choices=("box", "mask"), help="measure these alone (default: all there are)"
    )
    parser.add_argument(
        "--limits", type=int, nargs="+", default=[1, 10, 100, 300, 500, 1000], metavar="K",
        help="numbers of proposals per image, up to 2000 (default: 1 10 100 300 500 1000)",
    )  # fmt: skip
    unseen = parser.add_mutually_exclusive_group()
    unseen.add_argument(
        "--unseen", nargs="+", metavar="CATEGORY", help="categories that were not trained on"
    )
    unseen.add_argument(
        "--seen", nargs="+", metavar="CATEGORY",
        help="or those that were; 'voc' for PASCAL VOC's among COCO's",
    )  # fmt: skip
    parser.add_argument(
        "--box-mode",
        choices=("xyxy", "xywh", "yxyx"),
        help="of all files, against their formats' own",
    )
    parser.add_argument("--strict", action="store_true", help="fail on whatever looks wrong")
    parser.add_argument("--output", metavar="FOLDER", help="for JSON, CSV and pictures")
    return parser


def with_progress(overlaps: Iterable[np.ndarray], total: int, label: str) -> Iterator[np.ndarray]:
    """Pass on the images' overlaps, with a line on standard error from time to time."""
    start = last = time.monotonic()
    for index, overlaps_i in enumerate(overlaps):
        yield overlaps_i
        now = time.monotonic()
        if now - last >= _PROGRESS_PERIOD:
            last = now
            left = (now - start) / (index + 1) * (total - index - 1)
            print(f"{label}: {index + 1} of {total} images, {left:.0f} s left", file=sys.stderr)


def measure_run(
    run: ProposalRun, ground_truth: GroundTruth, limits: Sequence[int], unseen: set[int], kind: str,
    label: str,
) -> Measurement:  # fmt: skip
    """Measure the boxes or the masks of a file."""
    overlaps_of = box_overlaps_of if kind == "box" else mask_overlaps_of
    if kind == "mask":
        ground_truth = ground_truth.with_masks()
    overlaps = overlaps_of(ground_truth, run.proposals, run.usable, num_needed(limits, unseen))
    overlaps = with_progress(overlaps, len(run.proposals), label)
    return measure(overlaps, ground_truth, limits, unseen)


def report_ground_truth(ground_truth: GroundTruth, counts_difficult: bool) -> None:
    """Print what is wrong with the annotations, and how many objects are difficult."""
    for fault in ground_truth.faults:
        print(f"warning: annotations: [{fault.name}] {fault.message}", file=sys.stderr)
    if ground_truth.num_difficult:
        outcome = "they count" if counts_difficult else "they are left out"
        print(f"{ground_truth.num_difficult} objects are difficult; {outcome}", file=sys.stderr)


def report_faults(runs: dict[str, ProposalRun], ground_truth: GroundTruth, strict: bool) -> None:
    """Print what is wrong with each file; with ``strict`` that is the end."""
    for name, run in runs.items():
        for fault in run.faults:
            print(f"warning: {name}: [{fault.name}] {fault.message}", file=sys.stderr)
    faulty = {
        name: sorted({f.name for f in faults})
        for name, faults in (
            ("annotations", ground_truth.faults),
            *((name, run.faults) for name, run in runs.items()),
        )
        if faults
    }
    if strict and faulty:
        named = "; ".join(f"{name}: {', '.join(names)}" for name, names in faulty.items())
        raise SystemExit(f"Error: --strict, and something looks wrong (see above): {named}")


def write_results(
    folder: str, dataset: str, ground_truth: GroundTruth, runs: dict[str, ProposalRun],
    results: dict[str, dict[str, Measurement]], limits: Sequence[int],
) -> None:  # fmt: skip
    """Write JSON, CSV and a picture for each kind into a folder."""
    rows = []
    content = {
        "dataset": dataset,
        "num_difficult": ground_truth.num_difficult,
        "faults": {fault.name: fault.message for fault in ground_truth.faults},
        "limits": list(limits),
        "runs": {},
    }
    for name, run in runs.items():
        entry = {
            "format": run.format,
            "faults": {fault.name: fault.message for fault in run.faults},
        }
        for kind, measurements in results.items():
            if name not in measurements:
                continue
            measured = measurements[name]
            tasks = {"all": measured.metrics, **measured.by_categories}
            entry[f"{kind}_proposals"] = {
                "num_ground_truth": measured.num_ground_truth,
                "metrics_in_percent": tasks,
                "curves_in_percent": measured.curves,
                "diagnostics": measured.diagnostics,
            }
            for subset, metrics in tasks.items():
                task = f"{kind}_{subset}"
                rows += [(name, task, measure_, value) for measure_, value in metrics.items()]
        content["runs"][name] = entry
    write_json(os.path.join(folder, "results.json"), content)
    write_csv(os.path.join(folder, "results.csv"), rows)
    for kind, measurements in results.items():
        title = f"{'Boxes' if kind == 'box' else 'Masks'} of proposals on {dataset}"
        path = os.path.join(folder, f"{kind}_curves.png")
        with beside_numbers(path):
            plot_comparison(path, measurements, limits, title)


def print_results(kind: str, measurements: dict[str, Measurement]) -> None:
    """Print tables with a column for each file."""
    first = next(iter(measurements.values()))
    num_gt = ", ".join(f"{number} {name}" for name, number in first.num_ground_truth.items())
    print(f"\n{'Boxes' if kind == 'box' else 'Masks'}, in percent ({num_gt} objects)")
    print(compare_table({name: run.metrics for name, run in measurements.items()}))
    titles = {
        "seen": "seen categories alone",
        "unseen": "unseen categories alone",
        "unseen_budget": "unseen categories, proposals on seen objects outside of the budget (OLN)",
    }
    for subset, title in titles.items():
        if subset in first.by_categories:
            print(f"\n{'Boxes' if kind == 'box' else 'Masks'} of {title}, in percent")
            # The details are in the files.
            table = {
                name: {key: x for key, x in run.by_categories[subset].items() if "-" not in key}
                for name, run in measurements.items()
            }
            print(compare_table(table))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; ``arguments`` are those of the command line by default."""
    args = build_parser().parse_args(arguments)
    with bad_input_in_one_line():
        limits = check_limits(args.limits)
        paths = name_runs(args.proposals)
        if args.output:  # before the long work
            check_output_folder(args.output)
        (dataset,) = named_datasets(args)
        ground_truth = load_ground_truth(
            dataset,
            with_masks=args.kind != "box",
            count_difficult=not args.leave_out_difficult,
        )
        report_ground_truth(ground_truth, not args.leave_out_difficult)
        if not ground_truth.is_annotated or not len(ground_truth.boxes):
            left = ground_truth.num_crowd
            why = (
                f": what it has is {left} crowd regions (iscrowd), which do not count"
                if left
                else ""
            )
            raise SystemExit(
                f"Error: {args.gt or dataset} has no objects to measure recall of{why}"
            )
        unseen = choose_unseen(ground_truth, args.unseen, args.seen)
        runs = {}
        for name, path in paths.items():
            runs[name] = read_run(path, ground_truth, args.box_mode)
            numbers = runs[name].proposals.numbers
            print(f"{name}: {runs[name].format}, {sum(numbers)} proposals", file=sys.stderr)
            idle = describe_idle_limits(limits, numbers)
            if idle:
                print(f"note: {name}: {idle}", file=sys.stderr)
        report_faults(runs, ground_truth, args.strict)
        results: dict[str, dict[str, Measurement]] = {}
        for kind in (args.kind,) if args.kind else ("box", "mask"):
            measurable = {
                name: run
                for name, run in runs.items()
                if kind == "box" or (run.has_masks and ground_truth.segmentations is not None)
            }
            if args.kind == "mask" and not measurable:
                what = "the dataset" if ground_truth.segmentations is None else "no file"
                raise SystemExit(
                    f"Error: --kind mask, but {what} has {'no ' if what[0] == 't' else ''}masks"
                )
            if measurable:
                results[kind] = {
                    name: measure_run(run, ground_truth, limits, unseen, kind, f"{name}, {kind}")
                    for name, run in measurable.items()
                }
        print(f"{args.gt or dataset}: {len(ground_truth.image_ids)} images")
        for kind, measurements in results.items():
            print_results(kind, measurements)
        if args.output:
            write_results(args.output, args.gt or dataset, ground_truth, runs, results, limits)
            print(f"\n{args.output}: results.json, results.csv and pictures")


if __name__ == "__main__":
    main()
