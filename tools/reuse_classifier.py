"""Give DetectorNet's mask networks the layers of its trained classifier (Sec. 6).

    python tools/reuse_classifier.py --config-file configs/detectornet_voc.yaml \\
        --classifier output/detectornet_sliding_windows_voc/model_final.pth \\
        --output classifier_reused.pth
    python train_net.py --config-file configs/detectornet_voc.yaml \\
        MODEL.WEIGHTS classifier_reused.pth

"we first train the network for classification and reuse the weights of all layers but the
classifier for localization": each mask network of the configuration's model starts with a copy of
the classifier's layers, and the model's own classifiers with all of it.
"""

import argparse
import os
from collections.abc import Sequence

# Before torch is loaded: its threads would spin while they wait, which slows down whatever runs
# beside them, and themselves.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from detectron2.modeling import build_model

from d2proposals.detectornet.classifier_weights import reuse_classifier
from d2proposals.engine.model_command import command_config, model_parser, running_command
from d2proposals.engine.trained_model import without_trunk_weights
from d2proposals.files.atomic_files import atomic_write
from d2proposals.files.checkpoint_file import read_model


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = model_parser(__doc__, "configuration of the model that is to start so")
    parser.add_argument("--classifier", required=True, help="checkpoint of DetectorNetHeads")
    parser.add_argument("--output", required=True, help="checkpoint to write, ending in .pth")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; ``arguments`` are those of the command line by default."""
    parser = build_parser()
    with running_command(parser, arguments) as args:
        if not args.output.endswith(".pth"):
            parser.error(f"--output must end in .pth, got {args.output}")
        cfg = command_config(args)
        # Names and shapes are all that is wanted of it.
        cfg.MODEL.DEVICE = "meta"
        with torch.device("meta"):
            model = build_model(without_trunk_weights(cfg))
        weights = reuse_classifier(read_model(args.classifier), model)
        with atomic_write(args.output, "wb") as file:
            torch.save({"model": weights}, file)
    print(f"{args.output}: {len(weights)} tensors")


if __name__ == "__main__":
    main()
