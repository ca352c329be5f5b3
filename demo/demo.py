"""Draw the proposals of any model on your own images, a folder of images or a video.

    python demo/demo.py --input photo.jpg
    python demo/demo.py --masks --input photo.jpg
    python demo/demo.py --config-file configs/shapes/zip_rpn_only.yaml --input photo.jpg images/ \\
        --output drawn/ MODEL.WEIGHTS output/quickstart/model_final.pth
    python demo/demo.py --config-file configs/shapes/zip_rpn_only.yaml --input clip.mp4 \\
        --output drawn/ --top 20 MODEL.WEIGHTS output/quickstart/model_final.pth
    python demo/demo.py --config-file configs/shapes/zip_rpn_only.yaml --input images/ \\
        --gallery gallery.html MODEL.WEIGHTS output/quickstart/model_final.pth

Without --config-file they are those of the SC-RPN that comes with the package, trained on
photographs, or with --masks of its DeepMask (docs/model_card.md). The best proposals are drawn over
the others; yellow is the best, dark blue the last. Masks are filled where the model makes them. Of
a detector the proposals are drawn, not the detections. --gallery is one HTML file that needs no
network, with a slider for the number of proposals and the rank and score of each; it takes images.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, count
from pathlib import Path

# Before torch is loaded: its threads would spin while they wait, which slows down whatever runs
# beside them, and themselves.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.structures import Instances
from PIL import Image

from d2proposals import model_zoo
from d2proposals.engine import load_trained_model, network_input_of
from d2proposals.engine.model_command import (
    PROPOSALS_ONLY,
    command_config,
    model_parser,
    running_command,
)
from d2proposals.evaluation.collection import to_cpu
from d2proposals.files.atomic_files import atomic_write, check_output_folder
from d2proposals.files.image_files import read_rgb_image
from d2proposals.pictures.gallery import write_gallery
from d2proposals.pictures.gallery_entries import GalleryImage

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
VIDEO_SUFFIXES = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v"}
MASK_OPACITY = 0.35

# What is drawn without --config-file, with the weights that come with the package.
DEFAULT = "photos/sc_rpn_mobilenet_v2.yaml"
DEFAULT_MASKS = "photos/deepmask_narrow_mobilenet_v2.yaml"

# From an image, (H, W, 3) uint8 RGB, to its proposals in its own pixels.
Proposer = Callable[[np.ndarray], Instances]


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = model_parser(
        __doc__, f"configuration of the model (default: the trained {DEFAULT})", required=False
    )
    parser.add_argument(
        "--input",
        required=True,
        nargs="+",
        metavar="PATH",
        help="images, folders of images, videos",
    )
    parser.add_argument(
        "--masks", action="store_true", help="without --config-file: masks, not boxes (slower)"
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--output", default="demo_output", help="folder (default: demo_output)")
    output.add_argument("--gallery", metavar="FILE.html", help="one HTML file instead")
    parser.add_argument(
        "--top", type=int, default=20, help="best proposals, where a gallery begins (default: 20)"
    )
    parser.add_argument(
        "--keep", type=int, default=1000, help="best proposals in a gallery (default: 1000)"
    )
    return parser


def is_video(path: Path) -> bool:
    """Whether a file is a video, by its name."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def find_inputs(paths: Sequence[str]) -> list[Path]:
    """The images and videos that are named, those of folders in the order of their names.

    Raises:
        SystemExit: for a path that is neither, and for a folder without images.
    """
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(x for x in path.iterdir() if x.suffix.lower() in IMAGE_SUFFIXES)
            if not inside:
                raise SystemExit(f"Error: the folder {path} has no images in it.")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise SystemExit(f"Error: there is no image, folder or video {path}; check the path.")
    return found


def output_paths(inputs: Sequence[Path], folder: Path) -> list[Path]:
    """Where the picture or video of each input goes; inputs of one name get numbers, and none is
    written over an input."""
    names: dict[str, None] = {}  # in their order
    kept = {path.resolve() for path in inputs}
    for path in inputs:
        suffix = ".mp4" if is_video(path) else ".png"
        numbered = (f"{path.stem}_{number}{suffix}" for number in count(2))
        name = next(
            name
            for name in chain([path.stem + suffix], numbered)
            if name not in names and (folder / name).resolve() not in kept
        )
        names[name] = None
    return [folder / name for name in names]


def load_proposer(cfg: CfgNode) -> Proposer:
    """The configuration's model with the weights of ``MODEL.WEIGHTS``."""
    model = load_trained_model(cfg)
    network_input = network_input_of(cfg)

    @torch.no_grad()
    def propose(image: np.ndarray) -> Instances:
        pixels = network_input(image)
        height, width = image.shape[:2]
        return model([{"image": pixels, "height": height, "width": width}])[0]["proposals"]

    return propose


def draw(image: np.ndarray, proposals: Instances, top: int) -> np.ndarray:
    """Draw the best proposals.

    Args:
        image: (H, W, 3) uint8 RGB.
        proposals: of the image, in its pixels.
        top: how many.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    order = proposals.objectness_logits.argsort(descending=True, stable=True)[:top]
    boxes = proposals.proposal_boxes.tensor[order].cpu().numpy().round().astype(int)
    number = len(boxes)
    # Rank 0 is bright yellow; the map is monotone in lightness, so that it reads in grey, too.
    ramp = np.linspace(255, 30, max(number, 1)).astype(np.uint8)[:, None]
    colours = cv2.applyColorMap(ramp, cv2.COLORMAP_VIRIDIS)[:, 0, ::-1]
    drawn = image.copy()
    if proposals.has("proposal_masks") and number:
        bitmaps = proposals.proposal_masks[order].paste(*image.shape[:2]).cpu().numpy()
        for bitmap, colour in zip(bitmaps[::-1], colours[:number][::-1], strict=True):
            mixed = (1 - MASK_OPACITY) * drawn[bitmap] + MASK_OPACITY * colour
            drawn[bitmap] = mixed.astype(np.uint8)
    thickness = max(1, round(max(image.shape[:2]) / 400))
    for (x1, y1, x2, y2), colour in zip(boxes[::-1], colours[:number][::-1], strict=True):
        corners = ((int(x1), int(y1)), (int(x2) - 1, int(y2) - 1))
        # A dark rim keeps the colours apart from a background of the same colour.
        cv2.rectangle(drawn, *corners, (20, 20, 20), thickness + 2, cv2.LINE_AA)
        cv2.rectangle(drawn, *corners, tuple(int(x) for x in colour), thickness, cv2.LINE_AA)
    return drawn


class Reader:
    """Reads images, and leaves broken ones among them out.

    Attributes:
        faults: a line for each that was left out.
    """

    def __init__(self) -> None:
        self.faults: list[str] = []

    def read(self, path: Path) -> np.ndarray | None:
        """(H, W, 3) uint8 RGB, or None for a broken one."""
        try:
            return read_rgb_image(path)
        except ValueError as error:
            self.faults.append(str(error))
            print(f"Left out: {error}", file=sys.stderr)
            return None

    def finish(self, number: int) -> None:
        """Raise SystemExit if any of so many images was left out."""
        if self.faults:
            raise SystemExit(
                f"Error: {len(self.faults)} of {number} images are left out: {self.faults[0]}"
            )


def gallery_images(
    inputs: Sequence[Path], propose: Proposer, reader: Reader
) -> Iterator[GalleryImage]:
    """Images with their proposals, one at a time; nobody knows their objects."""
    for path in inputs:
        image = reader.read(path)
        if image is not None:
            yield GalleryImage(path.name, image, to_cpu([propose(image)]))
    if len(reader.faults) == len(inputs):
        reader.finish(len(inputs))


def draw_image(path: Path, output: Path, propose: Proposer, top: int, reader: Reader) -> None:
    """Draw an image file's proposals into a PNG file."""
    image = reader.read(path)
    if image is None:
        return
    drawn = draw(image, propose(image), top)
    with atomic_write(output, "wb") as file:
        Image.fromarray(drawn).save(file, format="PNG")
    print(f"{output}")


def read_frames(capture: cv2.VideoCapture) -> Iterator[np.ndarray]:
    """The frames of a video, (H, W, 3) uint8 RGB."""
    while True:
        is_read, frame = capture.read()
        if not is_read:
            return
        yield np.ascontiguousarray(frame[:, :, ::-1])


def draw_video(path: Path, output: Path, propose: Proposer, top: int) -> None:
    """Draw the proposals of each frame into an MP4 file, which takes its name when complete."""
    capture = cv2.VideoCapture(str(path))
    try:
        frames = read_frames(capture)
        first = next(frames, None)
        if first is None:
            raise SystemExit(f"Error: the video {path} cannot be read; is it complete?")
        total = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        rate = capture.get(cv2.CAP_PROP_FPS) or 25.0
        height, width = first.shape[:2]
        output.parent.mkdir(parents=True, exist_ok=True)
        # The writer tells the container by the suffix.
        temporary = output.with_name(f".{output.stem}.part{output.suffix}")
        writer = cv2.VideoWriter(
            str(temporary), cv2.VideoWriter_fourcc(*"mp4v"), rate, (width, height)
        )
        if not writer.isOpened():
            raise SystemExit(f"Error: this OpenCV cannot write {output}; give images instead.")
        number = 0
        try:
            frame: np.ndarray | None = first
            while frame is not None:
                drawn = draw(frame, propose(frame), top)
                writer.write(np.ascontiguousarray(drawn[:, :, ::-1]))
                number += 1
                if number % 50 == 0:
                    print(f"{path}: {number} of {total} frames", flush=True)
                frame = next(frames, None)
            writer.release()
            temporary.replace(output)
        finally:
            writer.release()
            temporary.unlink(missing_ok=True)
    finally:
        capture.release()
    print(f"{output}: {number} frames")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; ``arguments`` are those of the command line by default."""
    parser = build_parser()
    with running_command(parser, arguments) as args:
        if args.masks and args.config_file:
            parser.error("--masks is for the DeepMask that comes with the package: leave one out")
        if args.top < 1:
            parser.error(f"--top must be at least 1, not {args.top}")
        inputs = find_inputs(args.input)
        videos = [path for path in inputs if is_video(path)]
        if args.gallery and videos:
            raise SystemExit(f"Error: a gallery shows images; leave the video {videos[0]} out.")
        if not args.config_file:
            name = DEFAULT_MASKS if args.masks else DEFAULT
            args.config_file = model_zoo.get_config_file(name)
            cfg = model_zoo.get_config(name, trained=True)
            trained = ["MODEL.WEIGHTS", cfg.MODEL.WEIGHTS, "MODEL.TORCHVISION.WEIGHTS", ""]
            args.opts = [*trained, *args.opts]
        propose = load_proposer(command_config(args, *PROPOSALS_ONLY))
        reader = Reader()
        if args.gallery:
            write_gallery(
                args.gallery,
                gallery_images(inputs, propose, reader),
                runs=[Path(args.config_file).stem],
                about=f"{len(inputs)} images, {Path(args.config_file).stem}",
                top=args.top,
                keep=args.keep,
            )
            print(f"{args.gallery}: {len(inputs) - len(reader.faults)} images")
            reader.finish(len(inputs))
            return
        check_output_folder(args.output)
        for path, output in zip(inputs, output_paths(inputs, Path(args.output)), strict=True):
            if is_video(path):
                draw_video(path, output, propose, args.top)
            else:
                draw_image(path, output, propose, args.top, reader)
        reader.finish(len(inputs))


if __name__ == "__main__":
    main()
