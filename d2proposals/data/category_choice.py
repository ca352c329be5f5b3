"""Training on some of a dataset's categories, to measure recall of the others.

After D. Kim et al., "Learning Open-World Object Proposals without Learning to Classify", RA-L 2022,
arXiv:2108.06753, Sec. IV-A: objects of the other categories are left out of the annotations, so
that nothing tells them from background. The dataset's images and the numbers of its categories stay
as they are.
"""

from collections.abc import Sequence
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from ..files.annotation_file import find_categories


def with_chosen_categories(name: str, categories: Sequence[str]) -> str:
    """Register a copy of a dataset whose objects are those of some categories.

    Crowd regions of the other categories are gone, too. Images may have no object left: they are in
    the copy, and Detectron2's training loader leaves them out unless
    ``DATALOADER.FILTER_EMPTY_ANNOTATIONS`` is False.

    Args:
        name: of a registered dataset, which is read now.
        categories: names, or numbers counted from 0, as text; "voc" for PASCAL VOC's among COCO's.

    Returns:
        the copy's name.

    Raises:
        ValueError: in one line, for a category that the dataset does not have, and for a dataset
            whose function returns no list.
    """
    records = DatasetCatalog.get(name)
    if not isinstance(records, list):
        raise ValueError(
            f"DATASETS.CATEGORIES needs the records of '{name}' as a list, and its function "
            f"returns a {type(records).__name__}."
        )
    # Known when the dataset has been read.
    metadata = MetadataCatalog.get(name).as_dict()
    try:
        known = dict(enumerate(metadata.get("thing_classes") or []))
        kept = find_categories([str(item) for item in categories], known)
    except ValueError as error:
        raise ValueError(f"DATASETS.CATEGORIES, of '{name}': {error}.") from error
    chosen = [_with_objects_of(record, kept) for record in records]
    copy = f"{name} of {', '.join(map(str, categories))}"
    if copy in DatasetCatalog.list():
        DatasetCatalog.remove(copy)
        MetadataCatalog.remove(copy)
    DatasetCatalog.register(copy, lambda: chosen)
    # Without the file, which has the other objects.
    MetadataCatalog.get(copy).set(
        **{key: metadata[key] for key in metadata.keys() - {"json_file", "name"}}
    )
    return copy


def _with_objects_of(record: dict[str, Any], kept: set[int]) -> dict[str, Any]:
    """An image's record with the annotations of these categories alone."""
    if "annotations" not in record:
        return record
    annotations = [item for item in record["annotations"] if item.get("category_id") in kept]
    return {**record, "annotations": annotations}
