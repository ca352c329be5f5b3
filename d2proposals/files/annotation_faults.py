"""What may be wrong with annotations: counted, with the first of each kind shown."""

from typing import Any, NamedTuple

from .proposal_set import Fault


class _Kind(NamedTuple):
    """A kind of fault.

    Attributes:
        what: that is wrong, after "N annotations".
        outcome: what is done about it.
        needs_mending: Detectron2's reader stops at it, or takes it for something else.
    """

    what: str
    outcome: str
    needs_mending: bool = True


# The names that ``--strict`` and the toolbox's page have for them.
KINDS = {
    "gt-not-finite": _Kind("have a box that is not finite (NaN or infinity)", "left out"),
    "gt-negative-side": _Kind(
        "have a box with a negative side",
        "left out; a box is XYWH (x, y, width, height) in COCO's files, and otherwise as its "
        "'bbox_mode' says",
    ),
    "gt-empty-box": _Kind("have a box without area", "left out", needs_mending=False),
    "gt-no-box": _Kind("have neither a box of four numbers nor a mask", "left out"),
    "gt-box-of-mask": _Kind("have a mask but no box", "their box is that around their mask"),
    "gt-category": _Kind(
        "have a category that the dataset does not list",
        "they count in recall, as a category of their own; in training they are left out",
    ),
    "gt-unknown-images": _Kind("are of images that are not there", "left out", needs_mending=False),
    "gt-flag": _Kind(
        "have an 'iscrowd', 'difficult' or 'ignore' that is no number",
        "'1', 'true' and 'yes' are read as 1, anything else as 0",
    ),
    "gt-text": _Kind(
        "or images have text or a fraction where a number or a whole number belongs (ids, sizes, "
        "boxes, areas)",
        "read as the number it says",
    ),
    "gt-image-size": _Kind(
        "or images have a height or width that is no positive whole number",
        "that of the image's file counts",
    ),
    "gt-ignore": _Kind(
        "have 'ignore'",
        "they count in recall like difficult objects, as with pycocotools; in training they are "
        "neither objects nor background (crowd)",
    ),
    "gt-same-id": _Kind(
        "have an id that another one has", "each counts; pycocotools would count the last twice"
    ),
    "gt-area": _Kind(
        "have an 'area' that is missing, 0 or no positive number",
        "their size is that of their mask, else of their box",
        needs_mending=False,
    ),
    "gt-bad-mask": _Kind(
        "have polygons of which none has three points",
        "their boxes count, their masks do not; in training Detectron2 leaves such objects out",
        needs_mending=False,
    ),
    "gt-no-mask": _Kind(
        "have a 'segmentation' that is no mask of their image: an encoding of another size or "
        "length, or something else",
        "their boxes count, their masks do not; in training such objects are left out",
    ),
    "gt-mask-outside": _Kind(
        "have a mask without a pixel of their image", "nothing can match it", needs_mending=False
    ),
}


class AnnotationFaults:
    """Counts what is wrong with the annotations of a dataset."""

    def __init__(self) -> None:
        self._number: dict[str, int] = {}
        self._first: dict[str, str] = {}

    def add(self, name: str, where: str, value: Any = None) -> None:
        """Count a fault.

        Args:
            name: one of ``KINDS``.
            where: names the annotation or image.
            value: what it has there.
        """
        self._number[name] = self._number.get(name, 0) + 1
        if name not in self._first:
            shown = "" if value is None else f": {value!r}"
            self._first[name] = f"{where}{shown}"[:160]

    def count(self, name: str) -> int:
        """How many there are of a kind."""
        return self._number.get(name, 0)

    @property
    def need_mending(self) -> bool:
        """Whether Detectron2 cannot read the dataset as it is."""
        return any(KINDS[name].needs_mending for name in self._number)

    def to_list(self) -> list[Fault]:
        """One line for each kind, in the order of ``KINDS``."""
        return [
            Fault(
                name,
                f"{self._number[name]} annotations {kind.what}: {kind.outcome}. The first: "
                f"{self._first[name]}",
            )
            for name, kind in KINDS.items()
            if name in self._number
        ]
