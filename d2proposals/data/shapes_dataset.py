"""Registration of the embedded dataset with Detectron2.

Six names, all over images that this project renders by itself (`shapes_files`, no download):

    d2p_shapes_train, d2p_shapes_val
        all categories
    d2p_shapes_train_seen, d2p_shapes_val_seen
        the same images, annotated with ten seen categories only
    d2p_shapes_val_unseen
        the same images, annotated with the six other categories
    d2p_shapes_train_300
        the first 300 images of d2p_shapes_train, for detectors that are trained in minutes

A generator trained on ``d2p_shapes_train_seen`` and evaluated on the last two shows its recall of
categories that it knows and of those that it saw unannotated. Registration costs nothing; a split
is rendered when its dicts or the path of its annotations are first asked for.
"""

from functools import partial
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.data.datasets import load_coco_json

from .shapes_files import SPLITS, Split, dataset_root, ensure_split
from .shapes_outlines import CATEGORIES

# Name -> the name it is the beginning of, and how many images.
SUBSETS = {"d2p_shapes_train_300": ("d2p_shapes_train", 300)}


class ShapesMetadata(Metadata):
    """Metadata as `register_coco_instances` sets them, with paths that are found when used.

    Whoever reads ``json_file`` first, the data loader or an evaluator, finds the file there, and
    both paths follow ``$DETECTRON2_DATASETS`` as it is then.
    """

    @property
    def json_file(self) -> str:
        return str(ensure_split(find_split(self.name)) / f"{self.name}.json")

    @property
    def image_root(self) -> str:
        return str(dataset_root() / find_split(self.name).name / "images")


def find_split(name: str) -> Split:
    """Return the split of a registered name, such as "d2p_shapes_val_seen"."""
    return next(split for split in SPLITS if name in split.categories)


def load_shapes(name: str) -> list[dict[str, Any]]:
    """Return the dicts of a registered name in Detectron2's format; renders on first use."""
    metadata = MetadataCatalog.get(name)
    return load_coco_json(metadata.json_file, metadata.image_root, name)


def load_subset(name: str, num_images: int) -> list[dict[str, Any]]:
    """Return the dicts of the first images of a registered name; renders on first use."""
    return load_shapes(name)[:num_images]


def register_shapes_datasets() -> None:
    """Register all names that are not registered yet."""
    for split in SPLITS:
        for name in split.categories:
            if name in DatasetCatalog:
                continue
            DatasetCatalog.register(name, partial(load_shapes, name))
            MetadataCatalog[name] = ShapesMetadata(name=name).set(
                evaluator_type="coco",
                thing_classes=list(CATEGORIES),
                thing_dataset_id_to_contiguous_id={i + 1: i for i in range(len(CATEGORIES))},
            )
    for name, (whole, num_images) in SUBSETS.items():
        if name not in DatasetCatalog:
            DatasetCatalog.register(name, partial(load_subset, whole, num_images))
            # No json_file: evaluators that want one make it of the dicts.
            MetadataCatalog.get(name).set(evaluator_type="coco", thing_classes=list(CATEGORIES))


register_shapes_datasets()
