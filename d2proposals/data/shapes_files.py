"""Files of the embedded dataset: rendered on first use, verified on every use.

A split is a folder ``<root>/d2p_shapes-v<VERSION>/<split>/``:

    images/000001.jpg ...     the images
    d2p_shapes_<...>.json     COCO annotations, one file per registered dataset
    manifest.json             what the folder must hold: sizes of the images, digests of the rest

It is rendered in a temporary folder beside its place and moved there when complete, so that
a split is either there or not. A folder that does not match its manifest is rendered again.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
from iopath.common.file_io import file_lock
from portalocker.exceptions import LockException

from .shapes_outlines import CATEGORIES
from .shapes_rendering import render_image

logger = logging.getLogger(__name__)

# To be raised with every change of the images or annotations.
VERSION = 1
JPEG_QUALITY = 90
# Least time between two lines of progress, in seconds.
LOG_PERIOD = 3.0
# Room that the whole dataset takes, in MB.
DISK_SPACE = 60

# Categories that a generator may be trained on when its recall of unseen ones is measured. Both
# sides hold round, angular and jagged silhouettes.
SEEN_CATEGORIES = (
    "disk",
    "brick",
    "triangle",
    "star",
    "cross",
    "crescent",
    "arrow",
    "drop",
    "flower",
    "comb",
)
UNSEEN_CATEGORIES = ("hexagon", "heart", "gear", "house", "bolt", "fish")


@dataclass(frozen=True)
class Split:
    """A series of images.

    Attributes:
        name: name of the split and its folder.
        seed: number of the series for `render_image`.
        num_images: number of images.
        categories: names of the datasets over these images, each with the categories annotated
            there. The images are the same: an object of another category is seen and not annotated,
            as objects outside its categories are in COCO.
    """

    name: str
    seed: int
    num_images: int
    categories: dict[str, tuple[str, ...]]


SPLITS: tuple[Split, ...] = (
    Split(
        name="train",
        seed=0,
        num_images=1000,
        categories={"d2p_shapes_train": CATEGORIES, "d2p_shapes_train_seen": SEEN_CATEGORIES},
    ),
    Split(
        name="val",
        seed=1,
        num_images=200,
        categories={
            "d2p_shapes_val": CATEGORIES,
            "d2p_shapes_val_seen": SEEN_CATEGORIES,
            "d2p_shapes_val_unseen": UNSEEN_CATEGORIES,
        },
    ),
)


def dataset_root() -> Path:
    """Return the folder of the whole dataset, under ``$DETECTRON2_DATASETS`` as it is now."""
    root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
    return Path(root) / f"d2p_shapes-v{VERSION}"


def ensure_split(split: Split) -> Path:
    """Render a split unless it is there, and return its folder.

    Several processes may call this at once: one renders and the others wait for it. A complete
    split is only read, and may lie on a read-only disk.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = dataset_root() / split.name
    problem = find_problem(folder, split)
    if problem is None:
        return folder
    with _clear_write_errors(folder.parent):
        # Made here, because file_lock hides the reason when it cannot make its folder.
        folder.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(str(folder)):
            # Another process may have rendered it while this one waited.
            problem = find_problem(folder, split)
            if problem is not None:
                logger.info("Rendering %s: %s", folder, problem)
                _replace_folder(folder, lambda temporary: _write_split(temporary, split))
    return folder


def find_problem(folder: Path, split: Split) -> str | None:
    """Say in a few words what is wrong with a split's folder; None if it is complete."""
    if not folder.exists():
        return "not there yet"
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if len(manifest["image_bytes"]) != split.num_images:
            return f"{len(manifest['image_bytes'])} images instead of {split.num_images}"
        if manifest["digests"].keys() != {f"{name}.json" for name in split.categories}:
            return "the manifest lists other annotation files"
        for name, num_bytes in manifest["image_bytes"].items():
            if (folder / "images" / name).stat().st_size != num_bytes:
                return f"images/{name} has a wrong size"
        for name, digest in manifest["digests"].items():
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
                return f"{name} has changed"
    except (FileNotFoundError, NotADirectoryError) as error:
        return f"{Path(error.filename).relative_to(folder)} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json is broken"
    return None


@contextmanager
def _clear_write_errors(folder: Path) -> Iterator[None]:
    """Turn errors of writing, such as a read-only or full disk, into one clear line."""
    try:
        yield
    except (OSError, LockException) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(
            f"Cannot write the d2p_shapes dataset to '{folder.absolute()}': {reason}. Set the "
            "environment variable DETECTRON2_DATASETS to a writable folder with "
            f"{DISK_SPACE} MB of free space."
        ) from error


def _replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a new folder and move it to ``folder``; needs the lock on ``folder``."""
    # The lock is held: what lies here was left by processes that were killed.
    for leftover in folder.parent.glob(f".{folder.name}-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        # mkdtemp makes it private; datasets are often shared.
        temporary.chmod(0o755)
        write(temporary)
        if folder.is_dir():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write_split(folder: Path, split: Split) -> None:
    """Render all images of a split into an empty folder, the manifest last."""
    (folder / "images").mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    image_bytes: dict[str, int] = {}
    start = last_log = time.monotonic()
    for index in range(split.num_images):
        image, image_annotations = render_image(split.seed, index)
        name = f"{index + 1:06d}.jpg"
        _, jpeg = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        (folder / "images" / name).write_bytes(jpeg)
        image_bytes[name] = jpeg.size
        height, width = image.shape[:2]
        images.append({"id": index + 1, "file_name": name, "height": height, "width": width})
        for annotation in image_annotations:
            ids = {"id": len(annotations) + 1, "image_id": index + 1}
            annotations.append({**ids, **annotation})

        now = time.monotonic()
        if now - last_log >= LOG_PERIOD:
            last_log, done = now, index + 1
            eta = (now - start) / done * (split.num_images - done)
            logger.info("Rendering %s: %d/%d, ETA %.0f s", split.name, done, split.num_images, eta)

    digests = {}
    for name, categories in split.categories.items():
        text = json.dumps(coco_annotations(images, annotations, categories), separators=(",", ":"))
        (folder / f"{name}.json").write_text(text)
        digests[f"{name}.json"] = hashlib.sha256(text.encode()).hexdigest()
    manifest = {"image_bytes": image_bytes, "digests": digests}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    logger.info(
        "Rendered %d images of %s in %.1f s",
        split.num_images,
        split.name,
        time.monotonic() - start,
    )


def coco_annotations(
    images: list[dict[str, Any]], annotations: list[dict[str, Any]], categories: tuple[str, ...]
) -> dict[str, Any]:
    """Return the content of a COCO annotation file.

    Args:
        images: all images; each is kept, with or without annotations.
        annotations: annotations of all categories.
        categories: names of the categories whose annotations are kept. All categories are listed
            whatever is kept, so that an id means the same in every file.
    """
    kept_ids = {CATEGORIES.index(name) + 1 for name in categories}
    return {
        "info": {"description": "d2proposals embedded shapes dataset", "version": str(VERSION)},
        "licenses": [],
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(CATEGORIES)],
        "images": images,
        "annotations": [a for a in annotations if a["category_id"] in kept_ids],
    }
