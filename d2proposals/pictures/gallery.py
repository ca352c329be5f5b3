"""A page of pictures of proposals: one HTML file with everything in it, for any browser."""

import base64
import html
import io
import os
from collections.abc import Iterable

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..files.atomic_files import atomic_write
from .coverage import Coverage, ProposalPicture, draw_proposals

# Inches at 120 dots per inch; the longer side of an image.
_SIDE = 6.0
_DOTS_PER_INCH = 120

# The colours are those of the pictures; without scripts the page still shows all of them.
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font-family: sans-serif; margin: 1.5em; background: #fff; color: #111; }}
h1 {{ font-size: 1.3em; }}
.key {{ display: inline-block; width: 1.6em; border-top: 4px solid; margin: 0 .4em .25em 1.2em; }}
.grid {{ display: flex; flex-wrap: wrap; gap: 1em; align-items: flex-start; }}
figure {{ margin: 0; width: min(100%, 24em); }}
figure img {{ width: 100%; display: block; }}
figcaption {{ font-size: .9em; padding: .3em 0; overflow-wrap: anywhere; }}
figure:target, figure.large {{ width: 100%; }}
label {{ margin-right: 1em; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{summary}</p>
<p>Boxes:
<span class="key" style="border-color: #56B4E9; margin-left: .4em"></span>object covered at
IoU {iou:g} by the best {top} proposals
<span class="key" style="border-color: #F0E442"></span>its best proposal
<span class="key" style="border-color: #D55E00; border-top-style: dashed"></span>missed
object{masks}</p>
<p><label>Order: <select id="order">
<option value="place">as in the dataset</option>
<option value="missed">most missed objects first</option>
<option value="covered">most covered objects first</option>
</select></label> A click on a picture enlarges it.</p>
<div class="grid" id="grid">
{figures}
</div>
<script>
const grid = document.getElementById("grid");
const figures = [...grid.children];
figures.forEach(f => f.addEventListener("click", () => f.classList.toggle("large")));
document.getElementById("order").addEventListener("change", event => {{
  const key = event.target.value, sign = key === "place" ? 1 : -1;
  figures.sort((a, b) =>
    sign * (a.dataset[key] - b.dataset[key]) || a.dataset.place - b.dataset.place);
  grid.append(...figures);
}});
</script>
</body>
</html>
"""
_FIGURE = """<figure data-place="{place}" data-missed="{missed}" data-covered="{covered}">
<img alt="{alt}" loading="lazy" src="data:image/jpeg;base64,{data}">
<figcaption>{caption}</figcaption>
</figure>"""


def write_gallery(
    path: str | os.PathLike,
    pictures: Iterable[ProposalPicture],
    *,
    top: int = 100,
    iou_threshold: float = 0.5,
    title: str = "",
) -> tuple[int, int]:
    """Write one HTML file with a picture of each image, atomically.

    Args:
        path: of the file.
        pictures: at least one; they are drawn one by one, so an iterator saves memory.
        top: number of best-scored proposals that take part.
        iou_threshold: in (0, 1], from which on an object is covered.
        title: of the page.

    Returns:
        Numbers of covered objects and of objects.

    Raises:
        ValueError: without pictures, and as ``draw_proposals``.
    """
    figures, num_covered, num_objects, has_masks = [], 0, 0, False
    for place, picture in enumerate(pictures):
        data, found = _draw(picture, top, iou_threshold)
        covered, total = int(found.is_covered.sum()), len(found.is_covered)
        has_masks |= picture.gt_masks is not None and picture.proposal_masks is not None
        caption = f"image {picture.name}: {covered} of {total} objects covered"
        figures.append(
            _FIGURE.format(
                place=place,
                missed=total - covered,
                covered=covered,
                alt=html.escape(caption),
                caption=html.escape(caption),
                data=base64.b64encode(data).decode("ascii"),
            )
        )
        num_covered, num_objects = num_covered + covered, num_objects + total
    if not figures:
        raise ValueError("a gallery of proposal pictures needs at least one image")
    page = _PAGE.format(
        title=html.escape(title or "Proposals"),
        summary=f"{num_covered} of {num_objects} objects in {len(figures)} images are covered.",
        iou=iou_threshold,
        top=top,
        masks=". Tinted: masks of best proposals and of missed objects" if has_masks else "",
        figures="\n".join(figures),
    )
    with atomic_write(path) as file:
        file.write(page)
    return num_covered, num_objects


def _draw(picture: ProposalPicture, top: int, iou_threshold: float) -> tuple[bytes, Coverage]:
    """The picture as JPEG, without its title, which the page has as text."""
    height, width = picture.image.shape[:2]
    scale = _SIDE / max(height, width)
    # A figure of at least some dots, however thin the image.
    size = (max(width * scale, 0.5), max(height * scale, 0.5))
    figure = Figure(figsize=size, dpi=_DOTS_PER_INCH)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    found = draw_proposals(axes, picture, top, iou_threshold)
    axes.set_title("")
    buffer = io.BytesIO()
    canvas.print_jpg(buffer, pil_kwargs={"quality": 88})
    return buffer.getvalue(), found
