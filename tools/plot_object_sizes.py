"""Draw how large the objects of a dataset are, by object and by pixel (SPOP's Fig. 2 and 4).

    python tools/plot_object_sizes.py --config-file configs/spop_rpn_only.yaml \\
        --dataset coco_2017_val --output sizes.png

Areas are those of the annotations, in pixels of the original images; crowd is not counted. The
boundary between small and large objects is MODEL.SPOP.LARGE_AREA.
"""

import functools
import os
from collections.abc import Sequence

# Before torch is loaded: its threads would spin while they wait, which slows down whatever runs
# beside them, and themselves.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from d2proposals.engine import check_datasets
from d2proposals.engine.model_command import command_config, model_parser, running_command
from d2proposals.evaluation.ground_truth import load_ground_truth
from d2proposals.spop.object_sizes import size_distribution, write_size_picture

build_parser = functools.partial(
    model_parser,
    __doc__,
    dataset=(None, "by default the first of DATASETS.TRAIN"),
    output=("sizes.png", "image file to write"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; ``arguments`` are those of the command line by default."""
    parser = build_parser()
    with running_command(parser, arguments) as args:
        cfg = command_config(args)
        if not args.dataset and not cfg.DATASETS.TRAIN:
            parser.error("DATASETS.TRAIN is empty: name a dataset with --dataset")
        name = args.dataset or cfg.DATASETS.TRAIN[0]
        check_datasets([name])
        sizes = size_distribution(load_ground_truth(name).areas, boundary=cfg.MODEL.SPOP.LARGE_AREA)
        write_size_picture(args.output, sizes, name)
    print(
        f"{name}: {sizes.num_objects} objects, {100 * sizes.small_objects:.1f} % of them below "
        f"{sizes.boundary:.0f} pixels, which have {100 * sizes.small_pixels:.1f} % of the pixels"
    )


if __name__ == "__main__":
    main()
