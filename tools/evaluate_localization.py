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

from detectron2.structures import ImageList
from tqdm import tqdm

from d2proposals.data.mapper import ProposalDatasetMapper
from d2proposals.engine import check_datasets, load_trained_model
from d2proposals.engine.checked_datasets import records_to_test
from d2proposals.engine.model_command import (
    command_config,
    model_parser,
    running_command,
)
from d2proposals.proposals.native_size import ImageSizes, given_sizes
from d2proposals.spop.localization_error import (
    LocalizationErrors,
    add_localization_errors,
    find_spop,
)

MAX_IMAGES = (0, "evaluate the first images only (0: all)")
build_parser = functools.partial(model_parser, __doc__, max_images=MAX_IMAGES)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; ``arguments`` are those of the command line by default."""
    with running_command(build_parser(), arguments) as args:
        cfg = command_config(args)
        check_datasets(cfg.DATASETS.TEST)
        model = load_trained_model(cfg)
        generator = find_spop(model)
        cfg.INPUT.RANDOM_FLIP = "none"
        mapper = ProposalDatasetMapper(cfg, is_train=True)
        dicts = [record for name in cfg.DATASETS.TEST for record in records_to_test(cfg, name)]
        errors = LocalizationErrors()
        for dataset_dict in tqdm(dicts[: args.max_images or None], disable=None):
            mapped = mapper(dataset_dict)
            device = model.pixel_mean.device
            image = (mapped["image"].to(device) - model.pixel_mean) / model.pixel_std
            images = ImageList.from_tensors([image])
            with given_sizes([ImageSizes.of_input(mapped)]):
                add_localization_errors(errors, generator, images, [mapped["instances"].to(device)])
    print(errors.table())


if __name__ == "__main__":
    main()
