"""Where SPOP's time goes, part by part (the paper's Table IV and Sec. IV-C).

    python tools/benchmark_spop.py --config-file configs/spop_rpn_only.yaml --image-size 300 500

Of each scale, the seconds of each network, then superpixels, and refinement with ranking and NMS;
medians over --repeats passes over one picture, or over noise. Superpixels are computed beside the
networks, so the parts may add up to more than the whole. Weights are those of MODEL.WEIGHTS; with
random ones, proposals are scattered, and NMS takes longer than on a trained network's.
"""

import argparse
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

# Before torch is loaded: its threads would spin while they wait, which slows down whatever runs
# beside them, and themselves.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from detectron2.structures import ImageList

from d2proposals.engine import load_trained_model, network_input_of
from d2proposals.engine.model_command import command_config, model_parser, running_command
from d2proposals.files.image_files import read_rgb_image
from d2proposals.proposals.native_size import ImageSizes, given_sizes
from d2proposals.spop import SPOP
from d2proposals.spop import generator as generator_module
from d2proposals.spop.localization_error import find_spop


class Stopwatch:
    """Seconds of the parts of a generator, which measure themselves from then on."""

    def __init__(self, generator: SPOP):
        self.seconds: dict[str, float] = defaultdict(float)
        self._scale = ""
        networks = generator.networks
        predict_maps = networks.predict_maps

        def note_scale(image, size):
            self._scale = f", {size[0]} x {size[1]}"
            return predict_maps(image, size)

        networks.predict_maps = note_scale
        self._wrap(networks.confidence, "forward", "confidence network", at_scale=True)
        for name, network in networks.localization.items():
            self._wrap(network, "offsets", f"{name} network", at_scale=True)
        if generator.refinement is not None:
            # In a thread, which must not wait for the networks on a GPU.
            self._wrap(generator.refinement, "segment", "superpixels", waits=False)
        self._wrap(generator_module, "select_proposals", "refinement, ranking, NMS")

    def _wrap(
        self, owner: Any, name: str, part: str, *, at_scale: bool = False, waits: bool = True
    ) -> None:
        function = getattr(owner, name)

        def measured(*args, **kwargs):
            seconds, result = timed(lambda: function(*args, **kwargs), waits=waits)
            self.seconds[part + (self._scale if at_scale else "")] += seconds
            return result

        setattr(owner, name, measured)

    def take(self) -> dict[str, float]:
        """The seconds so far, which begin at 0 again."""
        seconds, self.seconds = dict(self.seconds), defaultdict(float)
        return seconds


def timed(function: Callable, *, waits: bool = True) -> tuple[float, Any]:
    """Seconds that a call takes, and its result."""
    synchronize(waits)
    begin = time.perf_counter()
    result = function()
    synchronize(waits)
    return time.perf_counter() - begin, result


def synchronize(waits: bool = True) -> None:
    """Wait for the GPU, if there is one at work."""
    if waits and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = model_parser(__doc__)
    parser.add_argument("--image-size", type=int, nargs=2, default=(300, 500), help="H W, pixels")
    parser.add_argument("--input", metavar="IMAGE", help="image file, instead of noise")
    parser.add_argument("--repeats", type=int, default=3, help="passes (default: 3)")
    return parser


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; ``arguments`` are those of the command line by default."""
    parser = build_parser()
    with running_command(parser, arguments) as args:
        if args.repeats < 1 or min(args.image_size) < 1:
            parser.error("--repeats and --image-size must be at least 1")
        cfg = command_config(args)
        if args.input:
            image = read_rgb_image(args.input)
        else:
            size = (*args.image_size, 3)
            image = torch.randint(0, 256, size, dtype=torch.uint8).numpy()
        model = load_trained_model(cfg)
        generator = find_spop(model)
        pixels = network_input_of(cfg)(image)
    height, width = image.shape[:2]
    pixels = (pixels.to(model.pixel_mean.device) - model.pixel_mean) / model.pixel_std
    images = ImageList.from_tensors([pixels])
    sizes = ImageSizes(tuple(pixels.shape[1:]), (height, width), tuple(pixels.shape[1:]))
    stopwatch = Stopwatch(generator)
    passes: dict[str, list[float]] = defaultdict(list)
    with given_sizes([sizes]):
        generator.predict_proposals(images)  # the first is slower
        stopwatch.take()
        for _ in range(args.repeats):
            seconds, _ = timed(lambda: generator.predict_proposals(images))
            for part, value in {**stopwatch.take(), "all": seconds}.items():
                passes[part].append(value)
    medians = {part: statistics.median(values) for part, values in passes.items()}
    print(f"{height} x {width}, {cfg.MODEL.DEVICE}, medians of {args.repeats}:")
    for part, value in medians.items():
        print(f"{part:36} {value:7.3f} s {value / medians['all']:5.0%}")


if __name__ == "__main__":
    main()
