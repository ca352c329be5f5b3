"""Time ProposalEvaluator against Detectron2's own proposal evaluation, on simulated proposals.

Detectron2 makes one pass per limit and area range, eight in its evaluator; ProposalEvaluator has
all its measures from one. Both get the same outputs in the same run.

    python tools/benchmark_evaluation.py --num-images 200
    python tools/benchmark_evaluation.py --masks --num-images 200 --num-proposals 100
    python tools/benchmark_evaluation.py --ours-alone --num-images 100000 --keep simulated

With --ours-alone an image's proposals are made when they are due and are held by nobody but the
evaluator, so that its memory is seen; making them is not timed. --keep leaves the evaluation's
files and the ground truth (gt.json) in a folder, for tools/evaluate_proposals.py.

With --masks the proposals are run-length encodings and the time is ours alone: Detectron2 has no
recall of masks. Peak memory is that of the whole process, the simulated proposals included.
"""

import argparse
import contextlib
import io
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

# Before torch is loaded: its threads would spin while they wait, which slows down whatever runs
# beside them, and themselves.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_dict
from detectron2.evaluation.coco_evaluation import _evaluate_box_proposals
from pycocotools.coco import COCO

from d2proposals.engine.resident_memory import peak_resident_memory
from d2proposals.evaluation import ProposalEvaluator
from d2proposals.evaluation.measurement import mask_overlaps_of, measure
from d2proposals.evaluation.simulation import simulate_dataset, simulate_masks, simulate_outputs
from d2proposals.files.atomic_files import write_json

LIMITS = (100, 1000)
IMAGES_AT_ONCE = 100
AREAS = {"": "all", "s": "small", "m": "medium", "l": "large"}


class Timed(NamedTuple):
    """Results in percent with the elapsed and the processor time that they took, in seconds.

    On a machine with other work, processor time is the one to compare.
    """

    results: dict[str, float]
    elapsed: float
    processor: float

    def __str__(self) -> str:
        return (
            f"{self.elapsed:7.2f} s elapsed, {self.processor:7.2f} s of processor time, "
            f"{len(self.results)} measures"
        )


def measure_time(evaluate: Callable[[], dict[str, float]]) -> Timed:
    start, processor_start = time.perf_counter(), time.process_time()
    results = evaluate()
    return Timed(results, time.perf_counter() - start, time.process_time() - processor_start)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-images", type=int, default=5000)
    parser.add_argument("--num-proposals", type=int, default=1000, help="per image")
    parser.add_argument("--num-gt", type=int, default=36, help="ground truths per image")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--masks", action="store_true", help="time the recall of masks")
    parser.add_argument(
        "--ours-alone", action="store_true", help="leave out Detectron2's evaluation"
    )
    parser.add_argument("--keep", type=Path, help="folder for the files and the ground truth")
    return parser.parse_args(argv)


def register(records: list[dict]) -> str:
    name = "simulated_proposals"
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).thing_classes = [str(index) for index in range(80)]
    return name


def time_ours(name: str, outputs: Iterable[tuple[dict, dict]], folder: Path) -> Timed:
    """From the model's outputs to results and files; without the time in which outputs are made."""
    evaluator = ProposalEvaluator(name, output_dir=str(folder))
    outputs = iter(outputs)
    elapsed = processor = 0.0

    def process(block: list[tuple[dict, dict]]) -> dict[str, float]:
        for input_, output in block:
            evaluator.process([input_], [output])
        return {}

    # A clock for each image would cost as much as the image.
    while block := list(itertools.islice(outputs, IMAGES_AT_ONCE)):
        timed = measure_time(lambda: process(block))
        elapsed += timed.elapsed
        processor += timed.processor
    timed = measure_time(lambda: evaluator.evaluate()["box_proposals"])
    return Timed(timed.results, timed.elapsed + elapsed, timed.processor + processor)


def ground_truth_of(name: str, records: list[dict]) -> dict:
    """A dataset in COCO's format, with the areas of the records in place of the boxes'."""
    with contextlib.redirect_stdout(io.StringIO()):
        converted = convert_to_coco_dict(name)
    annotations = (item for record in records for item in record["annotations"])
    for item, annotation in zip(converted["annotations"], annotations, strict=True):
        item["area"] = annotation["area"]
        item["bbox"] = annotation["bbox"]
    return converted


def time_detectron2(name: str, outputs: list[tuple[dict, dict]]) -> Timed:
    """From collected outputs to the results of Detectron2's eight passes."""
    coco = COCO()
    coco.dataset = ground_truth_of(name, [record for record, _ in outputs])
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    predictions = [{"image_id": i["image_id"], "proposals": o["proposals"]} for i, o in outputs]

    def evaluate() -> dict[str, float]:
        results = {}
        for limit, (suffix, area) in itertools.product(LIMITS, AREAS.items()):
            stats = _evaluate_box_proposals(predictions, coco, area=area, limit=limit)
            results[f"AR{suffix}@{limit}"] = 100 * stats["ar"].item()
        return results

    return measure_time(evaluate)


def time_masks(arguments: argparse.Namespace) -> None:
    """From encodings to results: IoU, matching and all measures."""
    ground_truth, proposals = simulate_masks(
        arguments.num_images, arguments.num_gt, arguments.num_proposals, arguments.seed
    )
    usable = [np.ones(len(item.boxes), bool) for item in proposals]
    before = peak_resident_memory()
    timed = measure_time(
        lambda: (
            measure(mask_overlaps_of(ground_truth, proposals, usable), ground_truth, LIMITS).metrics
        )
    )
    print(
        f"{arguments.num_images} images x {arguments.num_proposals} masks x {arguments.num_gt} "
        f"ground truths; AR@100 {timed.results['AR@100']:.2f}"
    )
    print(f"masks: {timed}")
    print(
        f"per image: {1000 * timed.elapsed / arguments.num_images:.1f} ms elapsed, "
        f"{1000 * timed.processor / arguments.num_images:.1f} ms of processor time; the work grows "
        "with the number of images"
    )
    print(memory_since(before))


def memory_since(before: int) -> str:
    """Peak memory now and before what is measured (bytes), for people."""
    now = peak_resident_memory()
    return f"peak memory: {now / 2**30:.2f} GiB, before the evaluation {before / 2**30:.2f} GiB"


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    if arguments.masks:
        time_masks(arguments)
        return
    records = simulate_dataset(arguments.num_images, arguments.num_gt, arguments.seed)
    outputs = simulate_outputs(records, arguments.num_proposals, arguments.seed + 1)
    if not arguments.ours_alone:
        outputs = list(outputs)
    name = register(records)
    before = peak_resident_memory()
    with contextlib.ExitStack() as stack:
        folder = arguments.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ours = time_ours(name, outputs, folder)
    memory = memory_since(before)
    if arguments.keep:
        write_json(folder / "gt.json", ground_truth_of(name, records))
    if arguments.ours_alone:
        print(f"ProposalEvaluator: {ours} and the files\n{memory}")
        return
    theirs = time_detectron2(name, outputs)
    difference = max(abs(ours.results[key] - value) for key, value in theirs.results.items())
    print(
        f"{arguments.num_images} images x {arguments.num_proposals} proposals x "
        f"{arguments.num_gt} ground truths, {torch.get_num_threads()} thread(s); "
        f"AR@100 {theirs.results['AR@100']:.2f}"
    )
    print(f"ProposalEvaluator: {ours} and the files; {memory}")
    print(f"Detectron2:        {theirs}")
    print(
        f"ratio: {theirs.elapsed / ours.elapsed:.1f} elapsed, "
        f"{theirs.processor / ours.processor:.1f} processor; "
        f"largest difference: {difference:.1e} points"
    )


if __name__ == "__main__":
    main()
