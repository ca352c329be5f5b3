"""Print how far SPOP's localisation networks are off, as in the paper's Tables II and III.

    python tools/evaluate_localization.py --config-file configs/spop_rpn_only.yaml \\
        MODEL.WEIGHTS output/spop_rpn_only/model_final.pth

Mean squared differences of x_min, y_min, x_max and y_max, in widths and heights of the image, over
the foreground cells of large and of small objects in DATASETS.TEST (which needs masks). Images are
resized as in training, without flips. With MODEL.SPOP.SCALE_AWARE False the one network is that of
Table II.
"""

import functools
import os
from collections.abc import Sequence

# Before torch is loaded: its threads would spin while they wait, which slows down whatever runs
# beside them, and themselves.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from d2proposals.engine import check_datasets, load_trained_model
from d2proposals.engine.labelled_images import labelled_test_images
from d2proposals.engine.model_command import (
    command_config,
    model_parser,
    running_command,
)
from d2proposals.spop.localization_error import find_spop, measure_localization

MAX_IMAGES = (0, "evaluate the first images only (0: all)")
build_parser = functools.partial(model_parser, __doc__, max_images=MAX_IMAGES)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; ``arguments`` are those of the command line by default."""
    with running_command(build_parser(), arguments) as args:
        cfg = command_config(args)
        check_datasets(cfg.DATASETS.TEST)
        model = load_trained_model(cfg)
        find_spop(model)
        errors = measure_localization(model, labelled_test_images(cfg, args.max_images))
    print(errors.table())


if __name__ == "__main__":
    main()
