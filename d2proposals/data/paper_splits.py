"""The papers' dataset splits, by name.

    coco_2014_val_first5k   first 5,000 images of COCO val2014, by image id (DeepMask Sec. 4, SPOP,
                            ZIP Sec. 5.1, "val 5k")
    voc_2007_test_difficult VOC 2007 test, all 4,952 images, objects marked "difficult" count (SPOP)
    voc_2007_test_easy      the same without them (as PASCAL's own evaluation)
    voc_2012_sbd_train, voc_2012_sbd_val, voc_2012_sbd_trainval
                            VOC images with the instance masks of SBD's lists; both together are
                            the 11,355 images of SPOP's training (Sec. IV)
    imagenet_det_train, imagenet_det_val2
                            ImageNet DET as COCO-style JSON (ZIP Sec. 5.1)

Files, below ``$DETECTRON2_DATASETS``:

    coco/annotations/instances_val2014.json, coco/val2014/
    VOC2007/{Annotations,ImageSets,JPEGImages}/
    sbd/{train,val}.txt, sbd/img/<id>.jpg, sbd/inst/<id>.mat   (the benchmark's "dataset" folder)
    imagenet_det/annotations/{train,val2}.json, imagenet_det/{train,val}/

Nothing is read before a split is used; a missing file is then named.
"""

import errno
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.data.datasets.pascal_voc import CLASS_NAMES
from detectron2.structures import BoxMode
from pycocotools import mask as mask_util
from scipy.io import loadmat

NUM_FIRST = 5000


def load_first_images(json_file: str, image_root: str, number: int = NUM_FIRST) -> list[dict]:
    """The first images of a COCO file, in ascending order of their ids.

    Args:
        json_file, image_root: of COCO's annotations and images.
        number: how many.
    """
    _check_exists(json_file)
    records = load_coco_json(json_file, image_root, "coco_2014_val")
    return sorted(records, key=lambda record: record["image_id"])[:number]


def load_voc(
    dirname: str, split: str, keep_difficult: bool, class_names: Sequence[str] = CLASS_NAMES
) -> list[dict[str, Any]]:
    """PASCAL VOC's boxes, with "difficult" objects or without.

    Detectron2's own reader keeps them, and does not tell which they are.

    Args:
        dirname: folder of a year, with Annotations, ImageSets and JPEGImages.
        split: a list in ImageSets/Main.
        keep_difficult: whether these objects count.
        class_names: names of the classes, in the order of their numbers.
    """
    listing = _check_exists(os.path.join(dirname, "ImageSets", "Main", f"{split}.txt"))
    records = []
    for image_id in Path(listing).read_text().split():
        path = _check_exists(os.path.join(dirname, "Annotations", f"{image_id}.xml"))
        tree = ElementTree.parse(path)
        annotations = []
        for item in tree.findall("object"):
            is_difficult = int(item.findtext("difficult", "0"))
            if is_difficult and not keep_difficult:
                continue
            corners = ("xmin", "ymin", "xmax", "ymax")
            box = [float(item.findtext(f"bndbox/{corner}")) for corner in corners]
            annotations.append(
                {
                    # Pixels are counted from 1, and the last ones belong to the object.
                    "bbox": [box[0] - 1, box[1] - 1, box[2], box[3]],
                    "bbox_mode": BoxMode.XYXY_ABS,
                    "category_id": class_names.index(item.findtext("name")),
                    "difficult": is_difficult,
                }
            )
        records.append(
            {
                "file_name": os.path.join(dirname, "JPEGImages", f"{image_id}.jpg"),
                "image_id": image_id,
                "height": int(tree.findtext("size/height")),
                "width": int(tree.findtext("size/width")),
                "annotations": annotations,
            }
        )
    return records


def load_sbd(dirname: str, split: str) -> list[dict[str, Any]]:
    """Instance masks of the Semantic Boundaries Dataset (Hariharan et al., ICCV 2011).

    Args:
        dirname: its "dataset" folder, with img/, inst/ and the lists.
        split: "train", "val" or "trainval", which is both.
    """
    lists = ("train", "val") if split == "trainval" else (split,)
    paths = [_check_exists(os.path.join(dirname, f"{name}.txt")) for name in lists]
    records = []
    for image_id in [item for path in paths for item in Path(path).read_text().split()]:
        path = _check_exists(os.path.join(dirname, "inst", f"{image_id}.mat"))
        instances = loadmat(path, squeeze_me=False, struct_as_record=True)["GTinst"][0, 0]
        labels = np.asarray(instances["Segmentation"])  # (H, W), 0 background, n the n-th object
        categories = np.asarray(instances["Categories"]).reshape(-1)
        annotations = [
            _mask_annotation(labels == index + 1, int(category) - 1)
            for index, category in enumerate(categories)
            if (labels == index + 1).any()
        ]
        records.append(
            {
                "file_name": os.path.join(dirname, "img", f"{image_id}.jpg"),
                "image_id": image_id,
                "height": int(labels.shape[0]),
                "width": int(labels.shape[1]),
                "annotations": annotations,
            }
        )
    return records


def _mask_annotation(bitmap: np.ndarray, category: int) -> dict[str, Any]:
    mask = mask_util.encode(np.asfortranarray(bitmap, np.uint8))
    return {
        "bbox": mask_util.toBbox(mask).tolist(),
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": category,
        "area": float(mask_util.area(mask)),
        "segmentation": mask,
    }


def load_coco_style(json_file: str, image_root: str, name: str) -> list[dict[str, Any]]:
    """A COCO-style file, such as a conversion of ImageNet DET."""
    return load_coco_json(_check_exists(json_file), image_root, name)


def _check_exists(path: str) -> str:
    if not os.path.isfile(path):
        # With the file's name apart, which `check_datasets` looks for.
        raise FileNotFoundError(
            errno.ENOENT,
            "DETECTRON2_DATASETS must be the folder that has the datasets, in the layout of "
            "d2proposals/data/paper_splits.py; missing",
            path,
        )
    return path


def _register(name: str, load: Callable[[], list[dict]], **metadata: Any) -> None:
    if name not in DatasetCatalog:
        DatasetCatalog.register(name, load)
        MetadataCatalog.get(name).set(**metadata)


def register_paper_splits() -> None:
    """Register all names; nothing is read."""
    root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
    coco = MetadataCatalog.get("coco_2014_val")
    json_file = os.path.join(root, "coco", "annotations", "instances_val2014.json")
    image_root = os.path.join(root, "coco", "val2014")
    _register(
        f"coco_2014_val_first{NUM_FIRST // 1000}k",
        partial(load_first_images, json_file, image_root),
        json_file=json_file,
        image_root=image_root,
        evaluator_type="coco",
        thing_classes=coco.thing_classes,
        thing_dataset_id_to_contiguous_id=coco.thing_dataset_id_to_contiguous_id,
    )
    for suffix, keep_difficult in (("difficult", True), ("easy", False)):
        dirname = os.path.join(root, "VOC2007")
        _register(
            f"voc_2007_test_{suffix}",
            partial(load_voc, dirname, "test", keep_difficult),
            dirname=dirname,
            split="test",
            year=2007,
            thing_classes=list(CLASS_NAMES),
        )
    for split in ("train", "val", "trainval"):
        dirname = os.path.join(root, "sbd")
        _register(
            f"voc_2012_sbd_{split}",
            partial(load_sbd, dirname, split),
            dirname=dirname,
            split=split,
            thing_classes=list(CLASS_NAMES),
        )
    for split, images in (("train", "train"), ("val2", "val")):
        name = f"imagenet_det_{split}"
        json_file = os.path.join(root, "imagenet_det", "annotations", f"{split}.json")
        image_root = os.path.join(root, "imagenet_det", images)
        _register(
            name,
            partial(load_coco_style, json_file, image_root, name),
            json_file=json_file,
            image_root=image_root,
            evaluator_type="coco",
        )


register_paper_splits()
