"""Show what a trained network proposes on photographs, then train the small ZIP on shapes.

Usage: python dev/quickstart.py [KEY VALUE ...]
"""

import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Before torch is loaded: its threads would spin while they wait, which slows down whatever runs
# beside them, and themselves.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import skimage
import torch
from detectron2.evaluation import inference_on_dataset
from tabulate import tabulate

from d2proposals.engine import Trainer, bad_input_in_one_line, launch_processes, load_config
from d2proposals.evaluation.evaluator import ProposalEvaluator
from d2proposals.evaluation.fixed_grid import evaluate_fixed_grid
from train_net import setup

CONFIG = "configs/shapes/zip_rpn_only.yaml"
# In scikit-image's wheel.
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png")
COLUMNS = ("AR@10", "AR@100", "AR@1000", "ARs@100", "ARm@100", "ARl@100")


def show_trained_network(output: Path) -> None:
    """Draw the proposals of the network that comes with the package, on scikit-image's photographs.

    Args:
        output: folder of the pictures.
    """
    folder = Path(skimage.__file__).parent / "data"
    photographs = [folder / name for name in PHOTOGRAPHS if (folder / name).is_file()]
    draw = [sys.executable, "demo/demo.py", "--input", *map(str, photographs)]
    subprocess.run([*draw, "--output", str(output)], check=True)
    print(f"What the trained SC-RPN proposes on photographs: {output}\n", flush=True)


def results_of(folder: Path) -> dict[str, Any]:
    """What an evaluation has written into its folder."""
    return json.loads((folder / "proposal_results.json").read_text(encoding="utf-8"))


def train(overrides: Sequence[str]) -> None:
    """Evaluate the small ZIP as it begins, train it, and evaluate it again.

    Args:
        overrides: KEY, VALUE, ...
    """
    with bad_input_in_one_line():
        cfg = setup(arguments(overrides))
        trainer = Trainer(cfg)
        dataset = cfg.DATASETS.TEST[0]
        inference_on_dataset(
            trainer.model,
            Trainer.build_test_loader(cfg, dataset),
            ProposalEvaluator(cfg, dataset, output_dir=str(Path(cfg.OUTPUT_DIR) / "untrained")),
        )
        trainer.resume_or_load(resume=False)
        trainer.train()  # ends with an evaluation


def arguments(overrides: Sequence[str]) -> Namespace:
    """What ``train_net.py`` would be called with."""
    opts = ["OUTPUT_DIR", os.path.join("output", "quickstart"), *overrides]
    return Namespace(config_file=CONFIG, opts=opts, eval_only=False, resume=False)


def main(overrides: Sequence[str]) -> None:
    started = time.perf_counter()
    cfg = load_config(arguments(overrides))
    if len(cfg.DATASETS.TEST) != 1:
        raise SystemExit("Error: the quick start tests on one dataset: name one in DATASETS.TEST.")
    output = Path(cfg.OUTPUT_DIR)
    show_trained_network(output / "photographs")
    # So small a network leaves a second thread little to do; a second process has half the images.
    can_halve = not torch.cuda.is_available() and cfg.SOLVER.IMS_PER_BATCH % 2 == 0
    num_processes = min(os.cpu_count() or 1, 2) if can_halve else 1
    launch_processes(train, overrides, num_processes, dist_url="auto")
    (dataset,) = cfg.DATASETS.TEST
    untrained, trained = (results_of(output / name) for name in ("untrained", "inference"))
    rows = {
        "grid of 100 boxes": evaluate_fixed_grid(dataset)["box_proposals"],
        "ZIP, untrained": untrained["metrics_in_percent"],
        f"ZIP, {cfg.SOLVER.MAX_ITER} iterations": trained["metrics_in_percent"],
    }
    table = tabulate(
        [[name, *(row[column] for column in COLUMNS)] for name, row in rows.items()],
        headers=["proposals", *COLUMNS],
        floatfmt=".1f",
    )
    minutes = (time.perf_counter() - started) / 60
    print(
        f"\nAverage recall on the {trained['num_images']} images of {dataset}, in percent "
        f"({minutes:.1f} minutes):\n\n{table}\n",
        flush=True,
    )
    picture = output / "proposals.png"
    draw = [sys.executable, "tools/visualize_proposals.py", "--config-file", CONFIG]
    proposals = output / "inference" / "box_proposals.pkl"
    draw += ["--proposals", str(proposals), "--output", str(picture), *overrides]
    subprocess.run(draw, check=True)
    print(
        f"Found and missed objects:  {picture}\n"
        f"Proposals on photographs:  {output / 'photographs'}\n"
        f"Recall curves:             {output / 'inference' / 'proposal_curves.png'}\n"
        f"Training curves:           tensorboard --logdir {output}\n\n"
        "What to run next:\n"
        "  bash dev/test.sh                                             the tests\n"
        f"  source {Path(sys.prefix) / 'bin' / 'activate'}\n"
        "                                                               then:\n"
        f"  python train_net.py --config-file {CONFIG} SOLVER.MAX_ITER 3000 "
        'SOLVER.STEPS "(2500,)"\n'
        "                                                               longer, better\n"
        "  python train_net.py --config-file configs/shapes/rpn_only.yaml\n"
        "                                                               Detectron2's own RPN\n"
        "  python train_net.py --config-file configs/zip_rpn_only.yaml  the paper's network, COCO"
    )


if __name__ == "__main__":
    with bad_input_in_one_line():
        main(sys.argv[1:])
