"""The one door of commands that run a trained model: arguments, configuration, images and errors.

A command states what is its own:

    build_parser = functools.partial(model_parser, __doc__, top=(5, "best boxes"))

    def main(arguments=None):
        with running_command(build_parser(), arguments) as args:
            cfg = command_config(args)
            ...
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from detectron2.config import CfgNode, get_cfg

from ..config import add_d2proposals_config
from ..files.image_files import read_rgb_image
from ..proposals.native_size import ImageSizes, given_sizes
from .bad_input import bad_input_in_one_line
from .job import check_config, check_datasets, fit_to_device, load_config
from .trained_model import load_trained_model, network_input_of

# Overrides for commands that look at proposals: a detector's are those of the proposal network
# inside it.
PROPOSALS_ONLY = ("MODEL.META_ARCHITECTURE", "ProposalNetwork")

Picture = TypeVar("Picture")


def model_parser(
    description: str,
    config_help: str = "configuration of the model",
    required: bool = True,
    **options: tuple[Any, str],
) -> argparse.ArgumentParser:
    """A parser with what these commands share: ``--config-file`` and overrides at the end.

    Args:
        description: of the command, printed as it stands.
        config_help: what the configuration is of.
        required: whether the command needs a configuration.
        **options: the command's own, by name: default, whose type values have (None: text), and
            help. What takes more than that is added to the parser.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=required, help=config_help)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE overrides")
    for name, (default, text) in options.items():
        kind = str if default is None else type(default)
        if isinstance(default, int | float) and not text.endswith(")"):
            text = f"{text} (default: {default:g})"
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=text)
    return parser


def picture_parser(
    description: str, output: str, **options: tuple[int | float, str]
) -> argparse.ArgumentParser:
    """A parser of a command that draws one picture of image files: ``--input``, ``--output``.

    Args:
        description: of the command, printed as it stands.
        output: the default.
        **options: as in :func:`model_parser`.
    """
    parser = model_parser(description, output=(output, "PNG file to write"), **options)
    parser.add_argument(
        "--input",
        required=True,
        nargs="+",
        metavar="IMAGE",
        help="image files",
    )
    return parser


@contextmanager
def running_command(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None = None,
    level: int = logging.WARNING,
) -> Iterator[argparse.Namespace]:
    """Parse the arguments and run a command, whose bad input ends it with one line.

    Args:
        parser: of the command.
        arguments: those of the command line by default.
        level: from which on messages of the log are printed, as they are.

    Raises:
        SystemExit: for wrong arguments and bad input.
    """
    logging.basicConfig(level=level, format="%(message)s")
    args = return_overrides(parser.parse_args(arguments))
    with bad_input_in_one_line():
        yield args


def return_overrides(args: argparse.Namespace) -> argparse.Namespace:
    """Give overrides back that an option with any number of words has taken.

    Args:
        args: parsed; changed in place. Words of its lists from the first on that names a key or
            begins as one, is not the option's only one, and no file, go into ``opts``.
    """
    if not hasattr(args, "opts"):
        return args
    cfg = get_cfg()
    add_d2proposals_config(cfg)
    for name, words in vars(args).items():
        if name == "opts" or not isinstance(words, list):
            continue
        for place, word in enumerate(words):
            node, dot, _ = str(word).partition(".")
            is_key = node in cfg and isinstance(cfg[node], CfgNode) == bool(dot)
            if place and is_key and not Path(word).exists():
                setattr(args, name, words[:place])
                args.opts = [*words[place:], *args.opts]
                break
    return args


def command_config(args: argparse.Namespace, *overrides: Any) -> CfgNode:
    """The configuration that the arguments name, fitted to this machine and checked.

    Args:
        args: with ``config_file`` and ``opts``.
        *overrides: KEY, VALUE, ... of the command itself, which go above the user's.

    Raises:
        FileNotFoundError, ValueError: as :func:`~d2proposals.engine.job.load_config` and
            :func:`~d2proposals.engine.job.check_config`.
    """
    cfg = load_config(args)
    fit_to_device(cfg)
    cfg.merge_from_list(list(overrides))
    check_config(cfg)
    return cfg


def dataset_of(args: argparse.Namespace, cfg: CfgNode, parser: argparse.ArgumentParser) -> str:
    """The dataset that ``--dataset`` or, without it, ``DATASETS.TEST`` names first; it is there."""
    if not args.dataset and not cfg.DATASETS.TEST:
        parser.error("DATASETS.TEST is empty: name a dataset with --dataset")
    name = args.dataset or cfg.DATASETS.TEST[0]
    check_datasets([name])
    return name


def run_picture_command(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    make_picture: Callable[..., Picture],
    write_sheet: Callable[[argparse.Namespace, list[Picture]], str | None],
) -> None:
    """Run a command that draws one picture of image files with a trained model.

    Within ``make_picture``, a generator that asks knows the size of the image.

    Args:
        parser: of :func:`picture_parser`.
        arguments: those of the command line by default.
        make_picture: takes the arguments, the model, (3, h, w) network input before normalisation,
            the image (H, W, 3) uint8 RGB, and its name.
        write_sheet: takes the arguments and the pictures, one of each image; may return what they
            are of, e.g. "level 2 of ".
    """
    with running_command(parser, arguments) as args:
        cfg = command_config(args)
        # Before the model, which takes longer.
        images = {path: read_rgb_image(path) for path in args.input}
        model = load_trained_model(cfg)
        network_input = network_input_of(cfg)
        pictures = []
        for path, image in images.items():
            height, width = image.shape[:2]
            pixels = network_input(image)
            mapped = {"image": pixels, "height": height, "width": width}
            with given_sizes([ImageSizes.of_input(mapped)]):
                pictures.append(make_picture(args, model, pixels, image, Path(path).name))
        print(f"{args.output}: {write_sheet(args, pictures) or ''}{len(pictures)} images")
