"""Train and measure the rows of a table of experiments, and write the table into pages.

    python tools/run_table.py --table docs/results/photos_coco.yaml
    python tools/run_table.py --table docs/results/photos_coco.yaml --rows sc_rpn --jobs 2 \\
        MODEL.DEVICE cuda
    python tools/run_table.py --table docs/results/photos_coco.yaml --rows sc_rpn-1 --again
    python tools/run_table.py --table docs/results/photos_coco.yaml --list
    python tools/run_table.py --pages docs/photos.md README.md

Rows that have a result are skipped and trainings that broke off go on, so the same command finishes
what was stopped. --again takes rows that have a result, too: measures them, and trains those whose
training is not in --folder. Where a row takes weights or proposals of another one, that is trained
first. A run trains in a folder below --folder; its result is a JSON file beside the table.
Overrides at the end hold for all runs. --pages writes the tables of pages from the results
(engine/result_pages.py).
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Before torch is loaded: its threads would spin while they wait, which slows down whatever runs
# beside them, and themselves.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from d2proposals.engine.experiment_tables import Run, is_untrained, read_table, result_file
from d2proposals.engine.experiments import (
    check_measurable,
    lacking_trainings,
    measure,
    train,
    write_result,
)
from d2proposals.engine.model_command import running_command
from d2proposals.engine.result_pages import write_pages
from d2proposals.files.atomic_files import check_output_folder


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--table", help="YAML file of the table to run")
    what.add_argument(
        "--pages", nargs="+", metavar="PAGE", help="write the tables of these pages, run nothing"
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        metavar="ROW",
        help="rows, or runs ROW-SEED (default: all)",
    )
    parser.add_argument("--folder", default="output/tables", help="where runs train")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time (default: 1)")
    parser.add_argument("--list", action="store_true", help="print what is finished, run nothing")
    parser.add_argument("--again", action="store_true", help="also the rows that have a result")
    parser.add_argument(
        "--stage",
        choices=("all", "train", "measure"),
        default="all",
        help="train alone, or measure what is trained, again where there is a result",
    )
    # What a run of its own process needs is trained, or its training failed.
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE overrides")
    return parser


def chosen_runs(
    args: argparse.Namespace, parser: argparse.ArgumentParser, runs: list[Run]
) -> list[Run]:
    """Those of a table's runs that ``--rows`` names."""
    if not args.rows:
        return runs
    known = {run.row for run in runs} | {run.name for run in runs}
    unknown = [name for name in args.rows if name not in known]
    if unknown:
        parser.error(f"{args.table} has no row {', '.join(unknown)}; it has {sorted(known)}")
    return [run for run in runs if run.row in args.rows or run.name in args.rows]


def finish(args: argparse.Namespace, run: Run) -> None:
    """Train and measure one run, as far as ``--stage`` says, and tell about it."""
    if args.stage != "measure" and not run.weights_of and not is_untrained(run, args.opts):
        print(f"{run.name}: training", flush=True)
        train(run, args.folder, args.opts)
    if args.stage != "train":
        print(f"{run.name}: measuring", flush=True)
        path = write_result(args.table, run, measure(run, args.folder, args.opts))
        print(f"{run.name}: {path}", flush=True)


def in_own_process(args: argparse.Namespace, run: Run, stage: str) -> int:
    """Finish one run in a process of its own, as far as ``--stage`` says; its exit status."""
    command = [sys.executable, __file__, "--table", args.table, "--rows", run.name]
    # The run was chosen already, whether it has a result or not.
    command += ["--alone", "--again", "--folder", args.folder, "--stage", stage, *args.opts]
    return subprocess.run(command).returncode


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; ``arguments`` are those of the command line by default."""
    parser = build_parser()
    with running_command(parser, arguments) as args:
        if args.pages:
            for page, number in write_pages(args.pages, ".").items():
                print(f"{page}: {number} tables")
            return
        all_runs = read_table(args.table)
        runs = chosen_runs(args, parser, all_runs)
        # Before the long work.
        if not args.list and args.stage != "train":
            check_output_folder(Path(args.table).with_suffix(""))
            for run in runs:
                check_measurable(run, args.folder, args.opts)
        is_done = {run.name: result_file(args.table, run).is_file() for run in runs}
        if args.list:
            for run in runs:
                print(f"{run.name}: {'finished' if is_done[run.name] else 'to do'}")
            return
        # To measure is to measure again.
        if args.stage != "measure" and not args.again:
            runs = [run for run in runs if not is_done[run.name]]
        # Trainings whose weights or proposals others take, of rows that are not run themselves.
        trains_others = args.stage != "measure" and not args.alone
        lacking = lacking_trainings(runs, all_runs, args.folder) if trains_others else []
        if len(runs) == 1:
            for run in lacking:
                print(f"{run.name}: training, which {runs[0].name} needs", flush=True)
                train(run, args.folder, args.opts)
            finish(args, runs[0])
            return
        # Those that train by themselves first, then those on their proposals: others have the
        # weights of either.
        trained_only = {run.name for run in lacking}
        runs = [*lacking, *runs]
        rounds = (
            [run for run in runs if not run.weights_of and not run.proposals_of],
            [run for run in runs if not run.weights_of and run.proposals_of],
            [run for run in runs if run.weights_of],
        )

        def finished(run: Run) -> int:
            return in_own_process(args, run, "train" if run.name in trained_only else args.stage)

        # Each in a process of its own: what one leaves behind, or its end, is not another's.
        with ThreadPoolExecutor(max(args.jobs, 1)) as pool:
            failed = sum(status != 0 for these in rounds for status in pool.map(finished, these))
        print(f"{Path(args.table).name}: {len(runs) - failed} runs finished, {failed} failed")
        if failed:
            raise SystemExit(1)


if __name__ == "__main__":
    main()
