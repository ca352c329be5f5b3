"""A page of proposals to play with: one HTML file that any browser opens, without network.

The page (gallery.html, .css, .js) draws boxes and masks over the photographs and counts while its
sliders move. It counts as the evaluator does: one-to-one matching, again for each number of
proposals and each choice of objects, so that its figures are those of
``tools/evaluate_proposals.py`` on the same images.

Whatever comes from data (names of images, categories and files) is text in the page: it travels as
JSON without a character that HTML knows, is only ever put into text nodes, and the page's
Content-Security-Policy lets nothing run but its own script, and nothing be loaded at all.
"""

import base64
import hashlib
import html
import json
import logging
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from importlib.resources import files
from string import Template
from typing import Any

from ..evaluation.recall import AREA_RANGES, CURVE_NUM_PROPOSALS, IOU_THRESHOLDS, MAX_LIMIT
from ..evaluation.report import AREA_NAMES, COLOURS, LINE_STYLES
from ..files.atomic_files import atomic_write, check_output_file
from .gallery_entries import GalleryImage, entry_of

logger = logging.getLogger(__name__)

# Beyond it, browsers take seconds to open the page.
_LARGE_BYTES = 40_000_000
# Matplotlib's line styles as dashes in SVG, in widths of the line.
_DASHES = dict(zip(LINE_STYLES, ("", "6 3", "6 2 1 2", "1 2"), strict=True))
_SCRIPTS = ("gallery_counts.js", "gallery_pictures.js", "gallery.js")


def write_gallery(
    path: str | os.PathLike,
    images: Iterable[GalleryImage],
    *,
    runs: Sequence[str],
    title: str = "Proposals",
    about: str = "",
    category_names: Mapping[int, str] | None = None,
    unseen: Collection[int] = (),
    top: int = 100,
    iou_threshold: float = 0.5,
    keep: int = 1000,
) -> None:
    """Write the page, atomically; a warning says if it is large, and what to reduce.

    Args:
        path: of the file.
        images: at least one; either all have objects or none has.
        runs: names of the sources of proposals, in the order of each image's.
        title: of the page.
        about: a line below the title.
        category_names: by category.
        unseen: categories that were not trained on; {} for no such split.
        top: where the slider of the number of proposals starts.
        iou_threshold: in [.5, 1], where the slider of the IoU starts; to a hundredth.
        keep: number of best-scored proposals of an image that the page holds, which is where the
            slider ends.

    Raises:
        OSError: in one line, before the first image, if the file cannot be written.
        ValueError: without images, for a number or a threshold out of range, and for an image that
            is not RGB bytes.
    """
    if not 1 <= keep <= MAX_LIMIT or top < 1:
        raise ValueError(
            f"the gallery holds from 1 to {MAX_LIMIT} proposals of an image and starts with at "
            f"least 1, not {keep} and {top}"
        )
    if not 0.5 <= iou_threshold <= 1:
        raise ValueError(
            f"the gallery counts objects covered at an IoU from .5 to 1, not {iou_threshold}"
        )
    # Before the images, which a model may be making.
    check_output_file(path)
    entries = [entry_of(image, keep) for image in images]
    if not entries:
        raise ValueError("a gallery of proposal pictures needs at least one image")
    data = {
        "about": about,
        "runs": [
            {
                "name": name,
                "colour": COLOURS[index % len(COLOURS)],
                "dash": _DASHES[LINE_STYLES[index % len(LINE_STYLES)]],
            }
            for index, name in enumerate(runs)
        ],
        "categories": _categories(entries, category_names or {}, unseen),
        "areaRanges": [
            {"name": AREA_NAMES[key], "low": low, "high": high if high < 2**53 else None}
            for key, (low, high) in AREA_RANGES.items()
        ],
        "thresholds": [round(100 * float(threshold)) for threshold in IOU_THRESHOLDS],
        "curve": list(CURVE_NUM_PROPOSALS),
        "top": top,
        "iou": round(100 * iou_threshold),
        "images": entries,
    }
    page = _fill_page(title, data)
    with atomic_write(path) as file:
        file.write(page)
    # ASCII but for the title.
    if len(page) > _LARGE_BYTES:
        logger.warning(
            f"{os.fspath(path)} has {len(page) / 1e6:.0f} MB and takes seconds to open: show fewer "
            f"images (now {len(entries)}), or keep fewer proposals of each (--keep, now {keep})"
        )


def _categories(
    entries: list[dict[str, Any]], names: Mapping[int, str], unseen: Collection[int]
) -> list[dict[str, Any]]:
    """The categories of the objects that there are; whether unseen is None without that split."""
    there = {category for entry in entries for category in (entry["objects"] or {}).get(
        "categories", ())}  # fmt: skip
    return [
        {
            "id": category,
            "name": names.get(category, "no category" if category < 0 else f"category {category}"),
            "unseen": category in unseen if unseen else None,
        }
        for category in sorted(there)
    ]


def _fill_page(title: str, data: dict[str, Any]) -> str:
    folder = files(__package__)
    style = folder.joinpath("gallery.css").read_text(encoding="utf-8")
    scripts = [folder.joinpath(name).read_text(encoding="utf-8") for name in _SCRIPTS]
    # One module in the page is several in the editor and for the linter.
    script = re.sub(r"^(import [^;]*;\n|export )", "", "".join(scripts), flags=re.MULTILINE)
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash_of(style)}; "
        f"script-src {_hash_of(script)}; base-uri 'none'; form-action 'none'"
    )
    return Template(folder.joinpath("gallery.html").read_text(encoding="utf-8")).substitute(
        policy=policy,
        title=html.escape(title),
        style=style,
        script=script,
        data=_json_for_html(data),
    )


def _hash_of(text: str) -> str:
    """A text as Content-Security-Policy names it."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def _json_for_html(data: Any) -> str:
    """JSON without the characters that could end the element that it stands in."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e")
