"""Check and time d2proposals on a GPU, and write what was found.

    python dev/gpu_checks.py
    python dev/gpu_checks.py --only benchmark --output output/benchmark.json
    python dev/gpu_checks.py --device cpu        # a dry run at tiny sizes

Three parts, each in a process of its own, so that none stops another:

* tests: the tests marked "gpu";
* benchmark: inference and training step of every generator beside RPN, in float32 and in mixed
  precision, at the size that Detectron2 trains and tests at, with random weights;
* parity: what the small configurations for photographs propose on the GPU and on the CPU.

The report is written after each row, as JSON; the exit status is 1 if a check failed.
"""

import argparse
import copy
import json
import math
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree as ElementTree
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Before torch is loaded: its threads would spin while they wait, which slows down whatever runs
# beside them, and themselves.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torchvision
from detectron2.modeling import build_model
from tabulate import tabulate

from d2proposals.engine import check_config, load_config
from d2proposals.evaluation.agreement import compare_runs
from d2proposals.files.atomic_files import check_output_folder, write_json
from d2proposals.proposals.image_pyramid import resize_image
from d2proposals.proposals.native_size_hosts import hand_over_native_sizes

ROOT = Path(__file__).resolve().parents[1]
# Seconds after which a part is stopped: eight minutes together.
PARTS = {"tests": 150, "benchmark": 240, "parity": 90}
# After these seconds of the benchmark no further row is begun.
BENCHMARK_SECONDS = 170.0
# Repeats are as many as fit into these seconds, at least and at most so many.
ROW_SECONDS, MIN_REPEATS, MAX_REPEATS = 1.5, 2, 20
# A turn that takes longer is timed once, and its warm-up is one turn.
SLOW_SECONDS = 5.0
TRAINING_BATCH = 2

GENERATORS = {
    "RPN": "rpn_only.yaml",
    "SC-RPN": "sc_rpn_only.yaml",
    "ZIP on FPN": "zip_fpn_only.yaml",
    "ZIP": "zip_rpn_only.yaml",
    "DetectorNet": "detectornet_rpn_only.yaml",
    "DeepMask": "deepmask_rpn_only.yaml",
    "SPOP": "spop_rpn_only.yaml",
}
DRY_GENERATORS = {"RPN": "shapes/rpn_only.yaml", "SC-RPN": "shapes/sc_rpn_only.yaml"}
DRY_OPTIONS = [
    "MODEL.FPN.OUT_CHANNELS", "16", "MODEL.SCRPN.HEAD_CHANNELS", "16",
]  # fmt: skip
PHOTOS = ("rpn", "sc_rpn", "zip", "deepmask", "detectornet", "spop")
# These begin with weights so small that all scores tie but for rounding.
SMALL_WEIGHTS = ("rpn_", "sc_rpn_", "zip_")
# Shares of the proposals found again, and greatest difference of their logits.
MIN_FOUND, MAX_SCORE_DIFFERENCE = 0.9, 1e-2


class Report:
    """The file of the results, in which each part has its place."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        check_output_folder(self.path.parent)

    def read(self) -> dict[str, Any]:
        return json.loads(self.path.read_text()) if self.path.is_file() else {}

    def update(self, part: str, **entries: Any) -> None:
        """Write entries of a part, beside those that it has."""
        content = self.read()
        content[part] = {**content.get(part, {}), **entries}
        write_json(self.path, finite(content))


def finite(value: Any) -> Any:
    """``value`` as standard JSON can say it: with None for NaN and infinity."""
    if isinstance(value, dict):
        return {key: finite(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def conditions(device: str) -> dict[str, Any]:
    """What the numbers depend on."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    on_gpu = device.startswith("cuda") and torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else device,
        "memory_bytes": torch.cuda.get_device_properties(device).total_memory if on_gpu else None,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "tf32": {
            "matmul": torch.backends.cuda.matmul.allow_tf32,
            "cudnn": torch.backends.cudnn.allow_tf32,
        },
        "cpu_threads": torch.get_num_threads(),
        "commit": commit.stdout.strip() or None,
    }


def run_tests(report: Report, device: str) -> list[str]:
    """Run the tests marked "gpu"; returns what failed."""
    # Not all of the suite is collected, which would take longer than these tests.
    files = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if "pytest.mark.gpu" in path.read_text()
    ]
    if device == "cpu":
        files = ["tests/proposals/test_mask_proposals.py"]
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "results.xml")
        options = ["-m", "gpu", "-q", "-p", "no:cacheprovider", "--durations=10"]
        command = [sys.executable, "-m", "pytest", *options, f"--junitxml={results}", *files]
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        suite = ElementTree.parse(results).getroot() if results.is_file() else None
    if suite is None:
        return [f"pytest ended with status {status} and no results"]
    counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
    failures, seconds = [], {}
    for case in suite.iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        faults = [x for x in case if x.tag in ("failure", "error")]
        outcome = "failed" if faults else "skipped" if case.find("skipped") is not None else ""
        counts[outcome or "passed"] += 1
        seconds[name] = float(case.get("time", 0))
        failures += [f"{name}: {x.get('message', '').splitlines()[:1]}" for x in faults]
    report.update("tests", counts=counts, seconds_of_tests=seconds)
    if device != "cpu" and counts["passed"] == 0:
        failures.append("no test was run on the GPU")
    if status not in (0, 5) and not failures:
        failures.append(f"pytest ended with status {status}")
    return failures


def run_benchmark(report: Report, device: str) -> list[str]:
    """Time every generator beside RPN; returns what failed."""
    tool = runpy.run_path(str(ROOT / "tools" / "benchmark.py"))
    is_dry = device == "cpu"
    height, width = (32, 64) if is_dry else (800, 1216)
    options = ["MODEL.DEVICE", device, "MODEL.WEIGHTS", "", *(DRY_OPTIONS if is_dry else [])]
    inputs = tool["make_inputs"](
        Namespace(
            height=height,
            width=width,
            # Of the file: an image of COCO, say, before Detectron2's resize.
            original_size=None if is_dry else (480, 730),
            batch=TRAINING_BATCH,
            objects=8,
            input=None,
        )
    )
    sizes = {"height": height, "width": width, "training_batch": TRAINING_BATCH}
    report.update("benchmark", **sizes, inference_batch=1, objects=8)

    def build(config: str) -> Any:
        return tool["build_candidate"](str(ROOT / "configs" / config), options, inputs, train=True)

    started = time.perf_counter()
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    baseline = None
    for name, config in (DRY_GENERATORS if is_dry else GENERATORS).items():
        try:
            candidate = build(config)
        except Exception as error:
            failures.append(f"{name}: {one_line(error)}")
            continue
        baseline, pair = baseline or candidate, None
        for train in (False, True):
            for amp in (False, True):
                row = {"generator": name, "config": config, "train": train, "amp": amp}
                if time.perf_counter() - started > BENCHMARK_SECONDS:
                    row["skipped"] = f"the benchmark's {BENCHMARK_SECONDS:.0f} s are over"
                else:
                    pair = [baseline] if candidate is baseline else [baseline, candidate]
                    row |= benchmark_row(tool, pair, train=train, amp=amp, is_dry=is_dry)
                if "error" in row:
                    failures.append(f"{describe(row)}: {row['error']}")
                rows.append(row)
                report.update("benchmark", rows=rows)
                say(f"{describe(row)}: {format_times(row)}")
        if candidate is not baseline:
            del candidate, pair
            if not is_dry:
                torch.cuda.empty_cache()
    return failures


def benchmark_row(
    tool: dict[str, Any], pair: Sequence[Any], *, train: bool, amp: bool, is_dry: bool
) -> dict[str, Any]:
    """Times of the last of a pair of models and their ratios to the first; else why none."""
    batch = TRAINING_BATCH if train else 1
    candidates = [in_mode(candidate, train=train) for candidate in pair]
    try:
        repeats = 1 if is_dry else count_repeats(tool, candidates, amp=amp)
        turns = tool["measure"](candidates, repeats, 0, amp=amp)
        row = tool["summarize"](candidates, turns, batch)[-1]
        del row["config"]
        row["generator_time"] = row.pop("generator")
        return {**row, "batch": batch, "repeats": len(turns[0])}
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {"skipped": "this GPU has too little memory"}
    except Exception as error:
        traceback.print_exc()
        return {"error": one_line(error)}
    finally:
        for candidate in pair:
            candidate.model.zero_grad(set_to_none=True)


def count_repeats(tool: dict[str, Any], candidates: Sequence[Any], *, amp: bool) -> int:
    """How often the models are timed, by the time of a turn; the first turn warms them up."""
    for _ in range(2):
        begun = time.perf_counter()
        tool["measure"](candidates, 1, 0, amp=amp)
        turn = time.perf_counter() - begun
        if turn > SLOW_SECONDS:
            return 1
    return min(max(int(ROW_SECONDS / turn), MIN_REPEATS), MAX_REPEATS)


def in_mode(candidate: Any, *, train: bool) -> Any:
    """A candidate in training, or in inference on its first image, without the ground truth."""
    inputs = candidate.inputs
    if not train:
        inputs = [{key: x for key, x in inputs[0].items() if key != "instances"}]
    return candidate._replace(model=candidate.model.train(train), inputs=inputs)


def run_parity(report: Report, device: str) -> list[str]:
    """Compare proposals of the CPU and of the device; returns what failed."""
    # In full single precision, which TF32 is not.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    is_dry = device == "cpu"
    size = (64, 96) if is_dry else (320, 427)
    report.update("parity", height=size[0], width=size[1])
    image = make_photograph(size)
    rows, failures = [], []
    for name in PHOTOS[:1] if is_dry else PHOTOS:
        row: dict[str, Any] = {"config": f"photos/{name}_mobilenet_v2.yaml"}
        try:
            row |= compare_devices(row["config"], image, device)
            is_same = abs(row["num_cpu"] - row["num_device"]) <= 0.05 * row["num_cpu"]
            is_same &= row["found"] >= MIN_FOUND
            row["passed"] = is_same and row["score_difference"] <= MAX_SCORE_DIFFERENCE
        except Exception as error:
            traceback.print_exc()
            row |= {"error": one_line(error), "passed": False}
        if not row["passed"]:
            failures.append(f"{row['config']}: the CPU and {device} differ")
        rows.append(row)
        report.update("parity", rows=rows)
        say(", ".join(f"{key} {x:.4g}" if isinstance(x, float) else f"{key} {x}"
                      for key, x in row.items()))  # fmt: skip
    return failures


def compare_devices(config: str, image: torch.Tensor, device: str) -> dict[str, Any]:
    """Agreement and seconds of a model on the CPU and on a device, on an image (3, H, W)."""
    options = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.TORCHVISION.WEIGHTS", ""]
    # Untrained scores are below the threshold.
    options += ["MODEL.DETECTORNET.SCORE_THRESH", "-1.0"]
    cfg = load_config(Namespace(config_file=str(ROOT / "configs" / config), opts=options))
    check_config(cfg)
    torch.manual_seed(1)
    model = build_model(cfg).eval()
    hand_over_native_sizes(model)
    name = config.split("/")[1]
    if name.startswith(SMALL_WEIGHTS):
        for parameter in model.proposal_generator.parameters():
            if parameter.dim() > 1:
                torch.nn.init.kaiming_normal_(parameter)
    elif name.startswith("spop_"):
        # Around a point, in sides of the network's input: untrained boxes have no side.
        for network in model.proposal_generator.networks.localization.values():
            network.offset.bias.data = torch.tensor([-20.0, -20.0, 20.0, 20.0]) / 513
    input_ = {"image": image, "height": image.shape[1], "width": image.shape[2]}
    runs, seconds = [], []
    for each in (model, copy.deepcopy(model).to(device)):
        with torch.no_grad():
            each([input_])
            begun = time.perf_counter()
            runs.append(each([input_])[0]["proposals"].to("cpu"))
            seconds.append(time.perf_counter() - begun)
    agreement = compare_runs(*runs)
    return {
        "num_cpu": agreement.num_first,
        "num_device": agreement.num_second,
        "found": agreement.found,
        "score_difference": agreement.score_difference,
        "seconds_cpu": seconds[0],
        "seconds_device": seconds[1],
    }


def make_photograph(size: tuple[int, int]) -> torch.Tensor:
    """(3, H, W) uint8 soft colours with some grain."""
    generator = torch.Generator().manual_seed(0)
    soft = resize_image(255 * torch.rand(3, 12, 16, generator=generator), size)
    grain = 20 * torch.randn(3, *size, generator=generator)
    return (soft + grain).clamp(0, 255).byte()


def say(line: str) -> None:
    """Print a line of progress with the seconds since the start."""
    print(f"[{time.perf_counter() - STARTED:6.1f} s] {line}", flush=True)


STARTED = time.perf_counter()


def one_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def describe(row: dict[str, Any]) -> str:
    mode = "training step" if row["train"] else "inference"
    return f"{row['generator']}, {mode}, {'mixed precision' if row['amp'] else 'float32'}"


def format_times(row: dict[str, Any]) -> str:
    if "total" not in row:
        return row.get("skipped") or row["error"]
    times = f"{1000 * row['total']['seconds_per_image']:.1f} ms an image"
    return f"{times}, {row['total']['ratio']:.2f} times RPN's, {row['repeats']} repeats"


def format_report(content: dict[str, Any]) -> str:
    """The report as Markdown."""
    given = ", ".join(f"{key} {x}" for key, x in content["conditions"].items())
    paragraphs = [given]
    if "counts" in content.get("tests", {}):
        counts = content["tests"]["counts"].items()
        paragraphs.append("Tests: " + ", ".join(f"{number} {key}" for key, number in counts))
    if content.get("benchmark", {}).get("rows"):
        paragraphs.append(format_benchmark(content["benchmark"]))
    if content.get("parity", {}).get("rows"):
        rows = content["parity"]["rows"]
        keys = ["config", "num_cpu", "num_device", "found", "score_difference"]
        keys += ["seconds_cpu", "seconds_device", "passed"]
        cells = [[row.get(key, "-") for key in keys] for row in rows]
        titles = [key.replace("_", " ") for key in keys]
        paragraphs.append(tabulate(cells, titles, tablefmt="pipe", floatfmt=".4g"))
    for part in PARTS:
        if part in content:
            failures = content[part].get("failures", ["not finished"])
            state = "; ".join(failures) if failures else "passed"
            paragraphs.append(f"{part}: {state} ({content[part].get('seconds', 0):.0f} s)")
    return "\n\n".join(paragraphs)


def format_benchmark(benchmark: dict[str, Any]) -> str:
    """The times as a table, an image's in milliseconds."""
    headers = ["generator", "mode", "precision", "total (ms)", "least..greatest", "to RPN's",
               "generator (ms)", "to RPN's", "memory (MiB)", "repeats"]  # fmt: skip
    cells = []
    for row in benchmark["rows"]:
        head = describe(row).split(", ")
        if "total" not in row:
            cells.append([*head, format_times(row), *["-"] * 6])
            continue
        total = row["total"]
        part = row.get("generator_step") or row["generator_time"]
        bounds = "..".join(f"{1000 * total[key]:.1f}" for key in ("least", "greatest"))
        memory = row["peak_memory_bytes"]
        cells.append(
            [
                *head,
                f"{1000 * total['seconds_per_image']:.1f}",
                bounds,
                f"{total['ratio']:.2f}",
                f"{1000 * part['seconds_per_image']:.1f}",
                f"{part['ratio']:.2f}",
                "-" if memory is None else f"{memory / 2**20:.0f}",
                row["repeats"],
            ]
        )
    note = (
        f"{benchmark['height']} x {benchmark['width']} pixels, per image; inference of 1 image, "
        f"training steps of {benchmark['training_batch']}. Memory: peak of a pass beyond what was "
        "in use before it."
    )
    return f"{tabulate(cells, headers, tablefmt='pipe', disable_numparse=True)}\n\n{note}"


RUNNERS: dict[str, Callable[[Report, str], list[str]]] = {
    "tests": run_tests,
    "benchmark": run_benchmark,
    "parity": run_parity,
}


def run_here(part: str, report: Report, device: str) -> None:
    """Run a part in this process and write how it ended."""
    report.update(part, failures=["not finished"])
    begun = time.perf_counter()
    try:
        failures = RUNNERS[part](report, device)
    except Exception as error:
        traceback.print_exc()
        failures = [one_line(error)]
    report.update(part, failures=failures, seconds=time.perf_counter() - begun)


def run_apart(part: str, report: Report, device: str) -> None:
    """Run a part in a process of its own, whatever becomes of it."""
    command = [sys.executable, str(Path(__file__).resolve()), "--here", "--only", part]
    command += ["--device", device, "--output", str(report.path)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    begun = time.perf_counter()
    failure = None
    # In a group of its own: what it has started would go on beside the next part.
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": path}, start_new_session=True
    )
    try:
        status = process.wait(PARTS[part])
        if status not in (0, 1):
            failure = f"the process ended with status {status}"
    except subprocess.TimeoutExpired:
        failure = f"stopped after {PARTS[part]} s"
    finally:
        # Also when this process is interrupted.
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if failure is not None:
        report.update(part, failures=[failure], seconds=time.perf_counter() - begun)


def parse_arguments(arguments: Sequence[str] | None) -> Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", default=",".join(PARTS), help="parts to run (default: %(default)s)"
    )
    parser.add_argument("--output", default="output/gpu_checks.json", help="(default: %(default)s)")
    parser.add_argument("--device", default="cuda", help='"cuda", or "cpu" for a dry run')
    parser.add_argument("--here", action="store_true", help="all parts in this process")
    args = parser.parse_args(arguments)
    args.only = args.only.split(",")
    unknown = set(args.only) - set(PARTS)
    if unknown:
        parser.error(f"--only takes {', '.join(PARTS)}, not {', '.join(sorted(unknown))}")
    if args.device != "cpu" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu makes a dry run")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; ``arguments`` are those of the command line by default."""
    args = parse_arguments(arguments)
    report = Report(args.output)
    if args.here:
        for part in args.only:
            run_here(part, report, args.device)
    else:
        report.path.unlink(missing_ok=True)
        report.update("conditions", **conditions(args.device))
        for part in args.only:
            say(f"{part} ...")
            run_apart(part, report, args.device)
            say(f"{part} done")
        print(format_report(report.read()))
        print(f"\nWritten to {report.path}")
    content = report.read()
    sys.exit(any(content.get(part, {}).get("failures", ["none"]) for part in args.only))


if __name__ == "__main__":
    main()
