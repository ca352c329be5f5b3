"""The weights of a checkpoint alone, in half precision: a small file to hand on.

    python tools/pack_weights.py output/photos/sc_rpn_mobilenet_v2/model_final.pth sc_rpn.pth

A model loads it in its own precision, as MODEL.WEIGHTS; a training does not resume from it.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

# Before torch is loaded: its threads would spin while they wait, which slows down whatever runs
# beside them, and themselves.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from d2proposals.engine.model_command import running_command
from d2proposals.files.atomic_files import atomic_write
from d2proposals.files.checkpoint_file import read_model, to_half_precision


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="of train_net.py")
    parser.add_argument("output", help="file to write, ending in .pth")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; ``arguments`` are those of the command line by default."""
    parser = build_parser()
    with running_command(parser, arguments) as args:
        if not args.output.endswith(".pth"):
            parser.error(f"the output must end in .pth, not {args.output}")
        packed = to_half_precision(read_model(args.checkpoint))
        with atomic_write(args.output, "wb") as file:
            torch.save({"model": packed}, file)
    print(f"{args.output}: {len(packed)} tensors, {Path(args.output).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
