"""Time models side by side on the same images, with random weights.

    python tools/benchmark.py configs/rpn_only.yaml configs/zip_fpn_only.yaml
    python tools/benchmark.py configs/rpn_only.yaml configs/zip_fpn_only.yaml --train --batch 2 \\
        --output benchmark.json MODEL.DEVICE cuda
    python tools/benchmark.py configs/rpn_only.yaml configs/sc_rpn_only.yaml --amp
    python tools/benchmark.py configs/faster_rcnn_rpn.yaml configs/faster_rcnn_spop.yaml \\
        --original-size 480 730 MODEL.WEIGHTS ""

In each round every model has one turn, so that whatever else the machine does meets all alike.
"generator" is the proposal generator alone: of two configurations with the same backbone it
compares the generators on the same features. In training, "generator step" is its forward and
backward pass on the backbone's feature maps. With random weights the scores are random too, and
the suppression of overlapping boxes meets boxes about as dense as anchors.

With --count there are the operations of convolutions and matrix products, in a pass of its own:
what they take at the machine's rate is the least time that a model can have.
"""

import argparse
import os
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

# Before torch is loaded: its threads would spin while they wait, which slows down whatever runs
# beside them, and themselves.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from PIL import Image
from tabulate import tabulate
from torch import nn

from d2proposals.engine import (
    bad_input_in_one_line,
    check_config,
    fit_to_device,
    load_config,
    prepare_execution,
)
from d2proposals.engine.forward_hooks import around_forward
from d2proposals.engine.operation_count import count_operations
from d2proposals.engine.resident_memory import resident_bytes
from d2proposals.files.atomic_files import atomic_write, write_json
from d2proposals.files.image_files import read_rgb_image
from d2proposals.proposals.native_size_hosts import hand_over_native_sizes


class Candidate(NamedTuple):
    """A model under test.

    Attributes:
        name: its configuration file.
        model: in training or evaluation mode, on its device.
        inputs: the batch, in the model's input format.
    """

    name: str
    model: nn.Module
    inputs: list[dict[str, Any]]


class Turn(NamedTuple):
    """One measured pass over a batch.

    Attributes:
        total: seconds of the whole pass.
        backbone, generator: seconds of these two parts, in training of their forward pass.
        generator_step: in training, seconds of the generator's forward and backward pass alone.
        memory: greatest number of bytes in use during the pass, less what was in use before it
            (all models, the images): allocated on a CUDA device, resident on a CPU. None where
            the system does not tell (CPUs outside Linux).
    """

    total: float
    backbone: float
    generator: float
    memory: int | None
    generator_step: float | None = None


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "configs",
        nargs="+",
        metavar="CONFIG.yaml",
        help="configurations, then KEY VALUE overrides for all of them",
    )
    parser.add_argument("--height", type=int, default=800, help="of the images (default: 800)")
    parser.add_argument("--width", type=int, default=1216, help="of the images (default: 1216)")
    parser.add_argument(
        "--original-size",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="of the image files, which generators that read them know (default: as given above)",
    )
    parser.add_argument("--batch", type=int, default=1, help="images in a batch (default: 1)")
    parser.add_argument(
        "--objects", type=int, default=8, help="objects of an image in training (default: 8)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="measured rounds (default: 5)")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before them (default: 1)")
    parser.add_argument("--train", action="store_true", help="time training: losses and gradients")
    parser.add_argument(
        "--amp",
        action="store_true",
        help="mixed precision: float16 where autocast allows on a GPU, bfloat16 on a CPU",
    )
    parser.add_argument(
        "--first-as-built",
        action="store_true",
        help="the first model computes as Detectron2 builds it, without MODEL.EXECUTION",
    )
    parser.add_argument(
        "--count",
        action="store_true",
        help="count floating-point operations of convolutions and matrix products",
    )
    parser.add_argument("--input", help="image file to use, resized, instead of noise")
    parser.add_argument("--output", help="file to write: JSON, or Markdown if it ends in .md")
    return parser


def parse_arguments(arguments: Sequence[str] | None) -> Namespace:
    """Parse the command line; ``configs`` and ``opts`` are told apart by the suffix."""
    parser = build_parser()
    # Intermixed, so that overrides may also stand behind options.
    args = parser.parse_intermixed_args(arguments)
    is_config = [name.endswith((".yaml", ".yml")) for name in args.configs] + [False]
    num_configs = is_config.index(False)
    args.configs, args.opts = args.configs[:num_configs], args.configs[num_configs:]
    if not args.configs:
        parser.error("name at least one configuration, a file ending in .yaml")
    for name in ("height", "width", "batch", "objects", "repeats"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(args, name)}")
    return args


def make_inputs(args: Namespace) -> list[dict[str, Any]]:
    """The batch that all models get, as Detectron2's mapper makes it, RGB, with ground truth."""
    generator = torch.Generator().manual_seed(0)
    size = (args.height, args.width)
    if args.input:
        picture = Image.fromarray(read_rgb_image(args.input)).resize(size[::-1])
        # (H, W, RGB) -> (RGB, H, W)
        images = [torch.from_numpy(np.array(picture)).permute(2, 0, 1)] * args.batch
    else:
        images = [
            torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)
            for _ in range(args.batch)
        ]
    height, width = args.original_size or size
    return [
        {"image": image, "height": height, "width": width, "instances": objects}
        for image, objects in zip(
            images,
            (make_objects(size, args.objects, generator) for _ in range(args.batch)),
            strict=True,
        )
    ]


def make_objects(image_size: tuple[int, int], number: int, generator: torch.Generator) -> Instances:
    """Rectangles of an eighth to a half of the image's sides, of class 0, with their masks."""
    height, width = image_size
    extent = torch.tensor([width, height], dtype=torch.float32)
    sides = extent * (0.125 + 0.375 * torch.rand(number, 2, generator=generator))
    corner = (extent - sides) * torch.rand(number, 2, generator=generator)
    boxes = torch.cat([corner, corner + sides], dim=1)
    x, y = torch.arange(width) + 0.5, torch.arange(height) + 0.5
    in_columns = (x >= boxes[:, :1]) & (x < boxes[:, 2:3])  # (number, W)
    in_rows = (y >= boxes[:, 1:2]) & (y < boxes[:, 3:])  # (number, H)
    return Instances(
        image_size,
        gt_boxes=Boxes(boxes),
        gt_classes=torch.zeros(number, dtype=torch.int64),
        gt_masks=BitMasks(in_rows[:, :, None] & in_columns[:, None, :]),
    )


def build_candidate(
    name: str,
    opts: Sequence[str],
    inputs: list[dict[str, Any]],
    *,
    train: bool,
    as_built: bool = False,
) -> Candidate:
    """Build the model of a configuration file, with random weights.

    Args:
        name: the file.
        opts: KEY VALUE overrides.
        inputs: of :func:`make_inputs`.
        train: whether training is timed.
        as_built: whether it computes as Detectron2 builds it, whatever MODEL.EXECUTION says.
    """
    cfg = load_config(Namespace(config_file=name, opts=list(opts)))
    fit_to_device(cfg)
    check_config(cfg)
    torch.manual_seed(0)
    model = hand_over_native_sizes(build_model(cfg)).train(train)
    if not as_built:
        model = prepare_execution(cfg, model)
    if getattr(model, "proposal_generator", None) is None:
        raise SystemExit(
            f"Error: {name} builds a {type(model).__name__} without a proposal generator to time; "
            "set MODEL.META_ARCHITECTURE and MODEL.PROPOSAL_GENERATOR.NAME accordingly."
        )
    return Candidate(name, model, inputs_for(cfg, inputs, train=train))


def inputs_for(cfg: CfgNode, inputs: list[dict[str, Any]], *, train: bool) -> list[dict[str, Any]]:
    """The batch in the model's channel order, on its device, so that no transfer is measured."""
    ret = []
    for input_ in inputs:
        if not train:
            input_ = {key: value for key, value in input_.items() if key != "instances"}
        image = input_["image"] if cfg.INPUT.FORMAT == "RGB" else input_["image"].flip(0)
        input_ = {**input_, "image": image.contiguous()}
        ret.append(
            {
                key: value.to(cfg.MODEL.DEVICE) if hasattr(value, "to") else value
                for key, value in input_.items()
            }
        )
    return ret


def take_turn(candidate: Candidate, amp: bool = False) -> Turn:
    """Measure one pass of a model over its batch, in mixed precision with ``amp``."""
    model = candidate.model
    device = model.device
    before = memory_before(device)
    with (
        part_timer(model.backbone, device) as backbone,
        part_timer(model.proposal_generator, device) as generator,
        recorded_arguments(model.proposal_generator) as arguments,
        torch.set_grad_enabled(model.training),
        EventStorage(),
    ):
        start = Moment(device)
        with mixed_precision(device, amp):
            outputs = model(candidate.inputs)
        if model.training:
            sum(outputs.values()).backward()
        total = Moment(device).seconds_since(start)
    memory = None if before is None else peak_memory(device) - before
    step = None
    if model.training:
        del outputs
        step = time_generator_step(model.proposal_generator, arguments[0], device, amp)
    model.zero_grad(set_to_none=True)
    return Turn(total, total_seconds(backbone), total_seconds(generator), memory, step)


def mixed_precision(device: torch.device, enabled: bool) -> torch.autocast:
    """The context of a forward pass, as Detectron2's trainer opens it with SOLVER.AMP."""
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=enabled)


def time_generator_step(
    generator: nn.Module, arguments: tuple[Any, ...], device: torch.device, amp: bool = False
) -> float:
    """Seconds of a generator's forward and backward pass, down to its feature maps' gradients.

    Args:
        generator: in training mode.
        arguments: those of its last call: images, features and ground truth.
        device: of the generator.
        amp: in mixed precision.
    """
    images, features, *rest = arguments
    features = {name: x.detach().requires_grad_(x.requires_grad) for name, x in features.items()}
    with EventStorage():
        start = Moment(device)
        with mixed_precision(device, amp):
            _, losses = generator(images, features, *rest)
        sum(losses.values()).backward()
        return Moment(device).seconds_since(start)


def memory_before(device: torch.device) -> int | None:
    """Bytes in use now, from which on the peak is counted; None where the system does not tell."""
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew
    except OSError:
        return None
    return resident_bytes("VmRSS")


def peak_memory(device: torch.device) -> int:
    """Greatest number of bytes in use since :func:`memory_before`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resident_bytes("VmHWM")


@contextmanager
def part_timer(part: nn.Module, device: torch.device) -> Iterator[list[tuple["Moment", "Moment"]]]:
    """Collect start and end of every forward pass of a part of a model within this context."""
    passes: list[tuple[Moment, Moment]] = []
    started: list[Moment] = []
    with around_forward(
        part,
        lambda: started.append(Moment(device)),
        lambda: passes.append((started.pop(), Moment(device))),
    ):
        yield passes


@contextmanager
def recorded_arguments(part: nn.Module) -> Iterator[list[tuple[Any, ...]]]:
    """Collect the arguments of every call of a part of a model within this context."""
    calls: list[tuple[Any, ...]] = []
    handle = part.register_forward_pre_hook(lambda _, args: calls.append(args))
    try:
        yield calls
    finally:
        handle.remove()


def total_seconds(passes: Sequence[tuple["Moment", "Moment"]]) -> float:
    """Seconds of passes from their starts to their ends."""
    return sum(end.seconds_since(start) for start, end in passes)


class Moment:
    """The moment when a device has done what it was given so far.

    On a GPU an event, which the GPU passes in its turn: nobody waits for it before the end.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type == "cuda":
            self._at = torch.cuda.Event(enable_timing=True)
            self._at.record()
        else:
            self._at = time.perf_counter()

    def seconds_since(self, start: "Moment") -> float:
        """Seconds from an earlier moment to this one; waits until it has come."""
        if isinstance(self._at, float):
            return self._at - start._at
        self._at.synchronize()
        return start._at.elapsed_time(self._at) / 1000


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    candidates: Sequence[Candidate],
    repeats: int,
    warmup: int,
    report: Callable[[str], None] = lambda line: None,
    *,
    amp: bool = False,
) -> list[list[Turn]]:
    """The measured turns of each model; round by round, each model once."""
    turns: list[list[Turn]] = [[] for _ in candidates]
    for round_ in range(-warmup, repeats):
        for candidate, own_turns in zip(candidates, turns, strict=True):
            turn = take_turn(candidate, amp)
            if round_ >= 0:
                own_turns.append(turn)
        label = f"round {round_ + 1} of {repeats}" if round_ >= 0 else "warm-up"
        report(f"{label} done")
    return turns


def summarize(
    candidates: Sequence[Candidate], turns: Sequence[Sequence[Turn]], batch: int
) -> list[dict[str, Any]]:
    """Seconds per image (median, least, greatest), ratios to the first model, memory, size.

    A ratio is the median over the rounds of the ratio within a round.
    """
    rows = []
    for candidate, own_turns in zip(candidates, turns, strict=True):
        row: dict[str, Any] = {"config": candidate.name}
        for part in measured_parts(own_turns):
            seconds = [getattr(turn, part) / batch for turn in own_turns]
            first = [getattr(turn, part) / batch for turn in turns[0]]
            row[part] = {
                "seconds_per_image": statistics.median(seconds),
                "least": min(seconds),
                "greatest": max(seconds),
                "ratio": statistics.median(
                    own / other for own, other in zip(seconds, first, strict=True)
                ),
            }
        memory = [turn.memory for turn in own_turns if turn.memory is not None]
        row["peak_memory_bytes"] = max(memory, default=None)
        row["parameters"] = sum(x.numel() for x in candidate.model.parameters())
        rows.append(row)
    return rows


def measured_parts(turns: Sequence[Turn]) -> list[str]:
    """The times that these turns have; the generator's step in training alone."""
    parts = ["total", "backbone", "generator"]
    return parts if turns[0].generator_step is None else [*parts, "generator_step"]


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """The summary as a table, times in seconds per image."""
    headers = ["config", "parameters", "memory (MiB)"]
    counted = ["total", "backbone", "generator"] if "gflop_per_image" in rows[0] else []
    headers += [f"{part} GFLOP" for part in counted]
    parts = [part for part in Turn._fields if part in rows[0]]
    for part in parts:
        headers += [f"{part.replace('_', ' ')} (s)", "min..max", "ratio"]
    cells = []
    for row in rows:
        memory = row["peak_memory_bytes"]
        cells.append(
            [
                row["config"],
                f"{row['parameters'] / 1e6:.2f} M",
                "-" if memory is None else f"{memory / 2**20:.0f}",
                *(f"{row['gflop_per_image'][part]:.1f}" for part in counted),
            ]
        )
        for part in parts:
            times = row[part]
            cells[-1] += [
                f"{times['seconds_per_image']:.4f}",
                f"{times['least']:.4f}..{times['greatest']:.4f}",
                f"{times['ratio']:.2f}",
            ]
    alignment = ["left", *["right"] * (len(headers) - 1)]
    return tabulate(cells, headers, tablefmt="pipe", colalign=alignment, disable_numparse=True)


def describe_conditions(args: Namespace, device: torch.device) -> dict[str, Any]:
    """What the numbers depend on."""
    is_cuda = device.type == "cuda"
    return {
        "mode": "training (forward and backward)" if args.train else "inference",
        "precision": "mixed" if args.amp else "float32",
        "device": torch.cuda.get_device_name(device) if is_cuda else str(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "height": args.height,
        "width": args.width,
        **({"original size": args.original_size} if args.original_size else {}),
        "batch": args.batch,
        **({"objects": args.objects} if args.train else {}),
        "repeats": args.repeats,
        **({"first": "as built"} if args.first_as_built else {}),
        "input": args.input or "noise",
        "overrides": args.opts,
    }


def format_report(conditions: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """Conditions and table in Markdown."""
    given = ", ".join(f"{key} {value}" for key, value in conditions.items() if value != [])
    note = "memory: peak of a pass beyond what was in use before it (all models)."
    return f"{given}\n\n{format_table(rows)}\n\n{note}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; ``arguments`` are those of the command line by default."""
    args = parse_arguments(arguments)
    with bad_input_in_one_line():
        inputs = make_inputs(args)
        candidates = [
            build_candidate(
                name,
                args.opts,
                inputs,
                train=args.train,
                as_built=args.first_as_built and number == 0,
            )
            for number, name in enumerate(args.configs)
        ]
    # The first pass of each, before those that are timed.
    counts = [count_operations(x.model, x.inputs) for x in candidates] if args.count else []
    turns = measure(
        candidates,
        args.repeats,
        args.warmup,
        lambda line: print(line, flush=True),
        amp=args.amp,
    )
    rows = summarize(candidates, turns, args.batch)
    for row, count in zip(rows, counts, strict=False):
        row["gflop_per_image"] = count
    conditions = describe_conditions(args, candidates[0].model.device)
    report = format_report(conditions, rows)
    print(report)
    if args.output and args.output.endswith(".md"):
        with atomic_write(args.output, "w") as file:
            file.write(report + "\n")
    elif args.output:
        write_json(args.output, {"conditions": conditions, "results": rows})


if __name__ == "__main__":
    main()
