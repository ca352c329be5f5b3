"""Write the proposals of a trained generator to files, for a Fast R-CNN that trains on them.

    python tools/export_proposals.py --config-file configs/shapes/sc_rpn_only.yaml \\
        --output output/proposals MODEL.WEIGHTS output/shapes/sc_rpn_only/model_final.pth
    python train_net.py --config-file configs/shapes/fast_rcnn_precomputed.yaml

There is one file per dataset, <dataset>.pkl, in Detectron2's format (MODEL.LOAD_PROPOSALS), with an
entry for each of its images. The images come as in the test: neither flipped nor cropped. Of a
two-stage detector the backbone and the generator run, the heads do not. Exact duplicates are taken
out before the best K are.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

# Before torch is loaded: its threads would spin while they wait, which slows down whatever runs
# beside them, and themselves.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from detectron2.config import CfgNode
from detectron2.evaluation import inference_on_dataset
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from d2proposals.engine import (
    ProposalNetworkWithTTA,
    Trainer,
    bad_input_in_one_line,
    check_datasets,
    launch_processes,
    load_trained_model,
    prepare_launch,
    without_test_resize,
)
from d2proposals.engine.checked_datasets import checked_dataset
from d2proposals.engine.model_command import command_config, model_parser, return_overrides
from d2proposals.evaluation.export import ProposalExporter, proposal_network_of
from d2proposals.files.atomic_files import check_output_folder


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = model_parser(__doc__, "configuration of the generator")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="for <dataset>.pkl")
    parser.add_argument(
        "--datasets",
        nargs="+",
        metavar="NAME",
        help="registered datasets (default: those of DATASETS.TRAIN and DATASETS.TEST)",
    )
    parser.add_argument(
        "--top", type=int, metavar="K",
        help="keep the K best of each image (default: all that the generator gives in the test)",
    )  # fmt: skip
    parser.add_argument(
        "--augment", action="store_true", help="with test-time augmentation (TEST.AUG)"
    )
    parser.add_argument("--num-gpus", type=int, default=1, help="processes (default: 1)")
    return parser


def setup(args: argparse.Namespace) -> CfgNode:
    """Make the configuration and start the loggers."""
    rank = comm.get_rank()
    for name in ("fvcore", "detectron2", "d2proposals"):
        setup_logger(distributed_rank=rank, name=name)
    # Images come without proposals of another origin.
    cfg = command_config(args, "MODEL.LOAD_PROPOSALS", False)
    cfg.freeze()
    return cfg


def export(args: argparse.Namespace) -> None:
    """Run one process of the command."""
    with bad_input_in_one_line():
        cfg = setup(args)
        names = list(dict.fromkeys(args.datasets or (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)))
        check_datasets(names)
        check_output_folder(args.output)
        paths = {name: str(Path(args.output) / f"{name}.pkl") for name in names}
        exporters = {
            name: ProposalExporter(checked_dataset(cfg, name, "TEST"), path, top=args.top)
            for name, path in paths.items()
        }
        network = proposal_network_of(load_trained_model(cfg))
        if args.augment:
            network = ProposalNetworkWithTTA(cfg, network)
        loader_cfg = without_test_resize(cfg) if args.augment else cfg
        lines = []
        for name, exporter in exporters.items():
            loader = Trainer.build_test_loader(loader_cfg, name)
            written = inference_on_dataset(network, loader, exporter)
            if written:
                number = f"{written['images']} images, {written['proposals']:.1f} proposals each"
                lines.append(f"{name}: {number}: {paths[name]}")
    if comm.is_main_process():
        print("\n".join([*lines, "Keys for training and testing on them:", *overrides(cfg, paths)]))


def overrides(cfg: CfgNode, paths: dict[str, str]) -> list[str]:
    """Lines with the keys that make a configuration use the files.

    Args:
        cfg: of the generator; its datasets keep their part in training or testing, and any other
            may have either.
        paths: of the files, by dataset.
    """
    parts = {
        part: [name for name in cfg.DATASETS[part] if name in paths] for part in ("TRAIN", "TEST")
    }
    others = [name for name in paths if not any(name in names for names in parts.values())]
    lines = [_override(part, names, paths) for part, names in parts.items() if names]
    return lines + [_override(part, [name], paths) for name in others for part in parts]


def _override(part: str, names: list[str], paths: dict[str, str]) -> str:
    files = tuple(paths[name] for name in names)
    return f'    DATASETS.{part} "{tuple(names)}" DATASETS.PROPOSAL_FILES_{part} "{files}"'


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; ``arguments`` are those of the command line by default."""
    parser = build_parser()
    args = return_overrides(parser.parse_args(arguments))
    if args.top is not None and args.top < 1:
        parser.error(f"--top must be at least 1, not {args.top}")
    if os.path.exists(args.output) and not os.path.isdir(args.output):
        parser.error(f"--output is a folder, but {args.output} is a file")
    with bad_input_in_one_line():
        prepare_launch(args)
    launch_processes(export, args, args.num_gpus, dist_url="auto")


if __name__ == "__main__":
    main()
