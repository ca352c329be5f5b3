"""Annotations mended where that has one meaning, and left out where they mean nothing.

For what is mended and what is left out see ``annotation_faults.KINDS``.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from detectron2.structures import BoxMode

from .annotation_faults import AnnotationFaults
from .annotation_values import is_finite, is_flag, read_flag, read_number, read_whole
from .run_length_encodings import is_text_of_bytes
from .segmentations import (
    is_dropped_by_detectron2,
    is_given,
    is_outside,
    segmentation_area,
    segmentation_box,
    usable_segmentation,
)

# Of annotations whose category the dataset does not list, or that have none.
NO_CATEGORY = -1
# A key of annotations that keep their box and lose what should have been their mask.
BAD_MASK = "has_bad_mask"
_FLAGS = ("iscrowd", "difficult", "ignore")
_PLAIN_NUMBERS = {int, float}


class AnnotationCleaner:
    """Reads the annotations of a dataset one by one and counts their faults."""

    def __init__(self, faults: AnnotationFaults, category_of: Callable[[int], int]) -> None:
        """
        Args:
            faults: that are added to.
            category_of: index of a category by the number that annotations have for it,
                ``NO_CATEGORY`` for one that is not listed.
        """
        self._faults = faults
        self._category_of = category_of
        # What may be missing everywhere, but not here and there: how many have it, and where the
        # others are.
        self._with = {"gt-area": 0, "gt-category": 0}
        self._without: dict[str, list[str]] = {name: [] for name in self._with}

    def clean(
        self,
        annotation: dict[str, Any],
        where: str,
        size: tuple[int, int] | None,
        bbox_mode: BoxMode = BoxMode.XYWH_ABS,
    ) -> dict[str, Any] | None:
        """Read an annotation.

        Args:
            annotation: with ``bbox``; ``category_id``, ``area``, ``segmentation`` and flags where
                they are there.
            where: names it in faults.
            size: (height, width) of its image in pixels, None if unknown.
            bbox_mode: of ``bbox``.

        Returns:
            the annotation with numbers of the right types; ``category_id`` an index,
            ``iscrowd`` always there; ``difficult`` and ``ignore`` only where they are 1; ``area``
            only where it is positive; ``segmentation`` only where it is a mask, and ``BAD_MASK``
            where it was given and is none. None for an annotation that is left out.
        """
        given = annotation.get("segmentation")
        segmentation = usable_segmentation(given, size) if is_given(given) else None
        box, bbox_mode = self._read_box(annotation.get("bbox"), bbox_mode, segmentation, where)
        if box is None:
            return None
        item = {"bbox": box, "bbox_mode": bbox_mode, "iscrowd": 0}
        for name in _FLAGS:
            value = annotation.get(name)
            if value is None:
                continue
            if not is_flag(value):
                self._faults.add("gt-flag", where, {name: value})
            if read_flag(value):
                item[name] = 1
        item["category_id"] = self._read_category(annotation, where)
        if "ignore" in item:
            self._faults.add("gt-ignore", where)
        if not item["iscrowd"]:
            self._read_area(annotation, item, where)
        if segmentation is not None:
            item["segmentation"] = segmentation
            if isinstance(segmentation, dict) and is_text_of_bytes(segmentation["counts"]):
                self._faults.add("gt-text", where, {"counts": segmentation["counts"]})
            if is_outside(segmentation, size):
                self._faults.add("gt-mask-outside", where)
        elif is_given(given):
            item[BAD_MASK] = True
            is_dropped = is_dropped_by_detectron2(given)
            self._faults.add("gt-bad-mask" if is_dropped else "gt-no-mask", where)
        return item

    def finish(self) -> None:
        """Count what some annotations lack, after the last one."""
        for name, places in self._without.items():
            if self._with[name]:
                for where in places:
                    self._faults.add(name, where)

    def _read_box(
        self, box: Any, bbox_mode: BoxMode, segmentation: Any, where: str
    ) -> tuple[list[float] | None, BoxMode]:
        """The box and its mode; None with its fault if there is none to use."""
        number = 5 if bbox_mode == BoxMode.XYWHA_ABS else 4
        if isinstance(box, np.ndarray):
            box = box.tolist()
        has_numbers = isinstance(box, (list, tuple)) and len(box) == number
        is_plain = has_numbers and {*map(type, box)} <= _PLAIN_NUMBERS
        if is_plain:
            values = box
        else:
            values = list(map(read_number, box)) if has_numbers else [None]
        is_of_mask = None in values
        if is_of_mask:
            if segmentation is None:
                self._faults.add("gt-no-box", where, box)
                return None, bbox_mode
            values, bbox_mode = segmentation_box(segmentation), BoxMode.XYWH_ABS
        fault = _fault_of_box(values, bbox_mode)
        if fault:
            self._faults.add(fault, where, list(values))
            return None, bbox_mode
        if is_of_mask:
            self._faults.add("gt-box-of-mask", where)
        elif not is_plain and any(isinstance(x, str) for x in box):
            self._faults.add("gt-text", where, box)
        return list(values), bbox_mode

    def _read_category(self, annotation: dict[str, Any], where: str) -> int:
        value = annotation.get("category_id")
        if value is None:
            self._without["gt-category"].append(where)
            return NO_CATEGORY
        self._with["gt-category"] += 1
        category = read_whole(value)
        if category is not None and type(value) in (str, float):
            self._faults.add("gt-text", where, {"category_id": value})
        index = NO_CATEGORY if category is None else self._category_of(category)
        if index == NO_CATEGORY:
            self._faults.add("gt-category", where, value)
        return index

    def _read_area(self, annotation: dict[str, Any], item: dict[str, Any], where: str) -> None:
        value = annotation.get("area")
        if value is None:
            self._without["gt-area"].append(where)
            return
        self._with["gt-area"] += 1
        area = read_number(value)
        if area is None or not (is_finite(area) and area > 0):
            self._faults.add("gt-area", where, value)
            return
        if isinstance(value, str):
            self._faults.add("gt-text", where, {"area": value})
        item["area"] = area


def _fault_of_box(values: list[float], bbox_mode: BoxMode) -> str | None:
    """The fault of a box that means nothing."""
    if not all(map(is_finite, values)):
        return "gt-not-finite"
    width, height = values[2], values[3]
    if bbox_mode in (BoxMode.XYXY_ABS, BoxMode.XYXY_REL):
        width, height = width - values[0], height - values[1]
    if width < 0 or height < 0:
        return "gt-negative-side"
    return None if width > 0 and height > 0 else "gt-empty-box"


def area_of(item: dict[str, Any]) -> float | None:
    """An object's area in square pixels: the annotation's, else its mask's; None without both."""
    if "area" in item:
        return float(item["area"])
    if item.get("segmentation") is None:
        return None
    return segmentation_area(item["segmentation"]) or None
