"""Where DeepMask's time goes, and what dense inference saves over patches one by one.

    python tools/benchmark_deepmask.py --config-file configs/deepmask_rpn_only.yaml \\
        --image-size 480 640 MODEL.DEVICE cpu

Times are of random weights and one noise image. The rate of a part is its multiply-accumulates per
second; beside it stands that of a large matrix product, measured in the same run on the same
threads. Patches one by one are timed on --num-patches windows and counted for as many windows as
one pass over a scale of --windows x --windows of them computes.
"""

import argparse
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from unittest.mock import patch

# Before torch is loaded: its threads would spin while they wait, which slows down whatever runs
# beside them, and themselves.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from detectron2.modeling import build_proposal_generator
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from d2proposals.deepmask.dense_inference import predict_windows
from d2proposals.deepmask.network import DeepMaskNetwork
from d2proposals.deepmask.trunk_maps import TrunkMaps
from d2proposals.engine import bad_input_in_one_line, check_config, fit_to_device, load_config


class Meter:
    """Seconds and multiply-accumulates of the parts of a network, within ``with meter:``."""

    def __init__(self, network: DeepMaskNetwork):
        """
        Args:
            network: the one that is measured.
        """
        self.seconds: dict[str, float] = {}
        self.work: dict[str, float] = {}
        mask, score = network.mask_head, network.score_head
        self._patches = [
            self._patch(owner, name, part)
            for owner, name, part in (
                (TrunkMaps, "_map_around_image", "trunk"),
                (TrunkMaps, "_map_in_tiles", "trunk"),
                (mask, "_classify", "mask layers"),
                (score, "at_every_window", "score layers"),
            )
        ]

    def _patch(self, owner: object, name: str, part: str) -> AbstractContextManager:
        function = getattr(owner, name)
        self.seconds[part] = self.work[part] = 0.0

        def measured(*args):
            with FlopCounterMode(display=False) as counter:
                seconds, result = timed(lambda: function(*args))
            self.seconds[part] += seconds
            # It counts a multiplication and an addition as two operations.
            self.work[part] += counter.get_total_flops() / 2
            return result

        return patch.object(owner, name, measured)

    def __enter__(self) -> None:
        self._stack = ExitStack()
        for item in self._patches:
            self._stack.enter_context(item)

    def __exit__(self, *error) -> None:
        self._stack.close()


def timed(function: Callable) -> tuple[float, object]:
    """Seconds that a call takes, and its result."""
    synchronize()
    begin = time.perf_counter()
    result = function()
    synchronize()
    return time.perf_counter() - begin, result


def synchronize() -> None:
    """Wait for the GPU, if there is one at work."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def matrix_rate(device: torch.device, size: int = 2048) -> float:
    """Multiply-accumulates per second of a matrix product."""
    a = torch.randn(size, size, device=device)
    a @ a
    return size**3 / min(timed(lambda: a @ a)[0] for _ in range(5))


def measure_dense(network: DeepMaskNetwork, side: int, num_patches: int) -> None:
    """Print what a pass over one scale costs and what its windows would cost one by one."""
    device = next(network.parameters()).device
    pixels = (side - 1) * network.stride
    image = torch.randn(3, pixels, pixels, device=device)
    number = side**2
    predict_windows(network, nn.Identity(), image[:, :1, :1], [1.0], 1)
    dense, windows = timed(lambda: predict_windows(network, nn.Identity(), image, [1.0], number))
    assert len(windows.frames) == number
    side = network.patch_size + 2 * network.context
    patches = torch.randn(num_patches, 3, side, side, device=device)

    def one_by_one():
        for one in patches.split(1):
            network.mask_and_score_logits(one, 1)

    alone = timed(one_by_one)[0] * number / num_patches
    print(f"{number} windows: dense {dense:.2f} s, one by one {alone:.1f} s ({alone / dense:.0f}x)")


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="configuration of a DeepMask")
    parser.add_argument("--image-size", type=int, nargs=2, default=(480, 640), help="H W, pixels")
    parser.add_argument("--num-patches", type=int, default=10, help="timed one by one")
    parser.add_argument("--windows", type=int, default=32, help="side of the compared pass")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE overrides")
    return parser


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; ``arguments`` are those of the command line by default."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    with bad_input_in_one_line():
        cfg = load_config(args)
        fit_to_device(cfg)
        check_config(cfg)
        if cfg.MODEL.PROPOSAL_GENERATOR.NAME != "DeepMask":
            parser.error("MODEL.PROPOSAL_GENERATOR.NAME must be DeepMask")
        generator = build_proposal_generator(cfg, {}).eval().to(cfg.MODEL.DEVICE)
    network = generator.network
    measure_dense(network, args.windows, args.num_patches)
    image = torch.randn(3, *args.image_size, device=cfg.MODEL.DEVICE)
    meter = Meter(network)
    rate = matrix_rate(image.device)
    topk = generator.pre_nms_topk[False]
    with meter:
        seconds, _ = timed(
            lambda: predict_windows(network, nn.Identity(), image, generator.scales, topk)
        )
    rate = max(rate, matrix_rate(image.device))
    height, width = args.image_size
    print(f"{height} x {width}, {len(generator.scales)} scales: {seconds:.2f} s")
    print(f"matrix product: {rate / 1e9:.1f} GMAC/s")
    for part, seconds_i in meter.seconds.items():
        rate_i = meter.work[part] / seconds_i
        print(f"{part:12} {seconds_i:6.2f} s {seconds_i / seconds:5.0%} {rate_i / rate:6.0%} of it")
    together = sum(meter.work.values()) / sum(meter.seconds.values())
    share = sum(meter.seconds.values()) / seconds
    print(
        f"{'together':12} {sum(meter.seconds.values()):6.2f} s {share:5.0%} {together / rate:6.0%}"
    )


if __name__ == "__main__":
    main()
