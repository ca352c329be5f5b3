"""Files and registration of the embedded dataset."""

import errno
import json
import logging
import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator

import d2proposals.data
from d2proposals.data import shapes_dataset, shapes_files
from d2proposals.data.shapes_files import (
    SEEN_CATEGORIES,
    SPLITS,
    UNSEEN_CATEGORIES,
    Split,
    ensure_split,
    find_problem,
)
from d2proposals.data.shapes_outlines import CATEGORIES

NAMES = [name for split in SPLITS for name in split.categories]


@pytest.fixture
def small_splits(tmp_path, monkeypatch):
    """The registered datasets with few images, under a new $DETECTRON2_DATASETS."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    splits = tuple(
        Split(name=s.name, seed=s.seed, num_images=n, categories=s.categories)
        for s, n in zip(SPLITS, (10, 6), strict=True)
    )
    monkeypatch.setattr(shapes_dataset, "SPLITS", splits)
    return splits


@pytest.fixture
def rendered(small_splits):
    """Folder and description of a complete small split."""
    return ensure_split(small_splits[1]), small_splits[1]


def test_a_subset_is_the_beginning_of_its_whole(small_splits, monkeypatch):
    monkeypatch.setitem(shapes_dataset.SUBSETS, "first_four", ("d2p_shapes_train", 4))
    d2proposals.data.register_shapes_datasets()
    try:
        subset = DatasetCatalog.get("first_four")
        assert subset == DatasetCatalog.get("d2p_shapes_train")[:4] and len(subset) == 4
        assert MetadataCatalog.get("first_four").thing_classes == list(CATEGORIES)
    finally:
        DatasetCatalog.remove("first_four")
        MetadataCatalog.remove("first_four")


def test_registration_costs_nothing(small_splits, tmp_path):
    assert set(NAMES) <= set(DatasetCatalog)
    d2proposals.data.register_shapes_datasets()  # a second time does nothing
    for name in NAMES:
        metadata = MetadataCatalog.get(name)
        assert metadata.thing_classes == list(CATEGORIES)
        assert metadata.evaluator_type == "coco"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", NAMES)
def test_loads_as_register_coco_instances_does(small_splits, name):
    dicts = DatasetCatalog.get(name)
    metadata = MetadataCatalog.get(name)
    other = f"{name}_registered_by_detectron2"
    register_coco_instances(other, {}, metadata.json_file, metadata.image_root)
    try:
        assert DatasetCatalog.get(other) == dicts
        assert MetadataCatalog.get(other).thing_classes == metadata.thing_classes
        assert (
            MetadataCatalog.get(other).thing_dataset_id_to_contiguous_id
            == metadata.thing_dataset_id_to_contiguous_id
        )
    finally:
        DatasetCatalog.remove(other)
        MetadataCatalog.remove(other)
    assert len(dicts) == shapes_dataset.find_split(name).num_images
    assert all(Path(record["file_name"]).is_file() for record in dicts)


def test_names_by_category(small_splits):
    assert set(SEEN_CATEGORIES) | set(UNSEEN_CATEGORIES) == set(CATEGORIES)
    assert not set(SEEN_CATEGORIES) & set(UNSEEN_CATEGORIES)
    everything, seen, unseen = (
        DatasetCatalog.get(f"d2p_shapes_val{suffix}") for suffix in ("", "_seen", "_unseen")
    )
    for record, record_seen, record_unseen in zip(everything, seen, unseen, strict=True):
        assert record["file_name"] == record_seen["file_name"] == record_unseen["file_name"]
        for part, names in ((record_seen, SEEN_CATEGORIES), (record_unseen, UNSEEN_CATEGORIES)):
            kept = [a for a in record["annotations"] if CATEGORIES[a["category_id"]] in names]
            assert part["annotations"] == kept
    assert any(record["annotations"] for record in unseen)


def test_folder_follows_the_environment(small_splits, tmp_path, monkeypatch):
    first = DatasetCatalog.get("d2p_shapes_val")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "elsewhere"))
    second = DatasetCatalog.get("d2p_shapes_val")
    assert first[0]["file_name"] != second[0]["file_name"]
    assert Path(second[0]["file_name"]).read_bytes() == Path(first[0]["file_name"]).read_bytes()
    assert str(tmp_path / "elsewhere") in MetadataCatalog.get("d2p_shapes_val").json_file


def test_evaluator_may_come_before_the_loader(small_splits, tmp_path):
    evaluator = COCOEvaluator("d2p_shapes_val", output_dir=str(tmp_path / "output"))
    assert len(evaluator._coco_api.imgs) == 6


def test_metadata_survives_pickling():
    metadata = pickle.loads(pickle.dumps(MetadataCatalog.get("d2p_shapes_val")))
    assert metadata.thing_classes == list(CATEGORIES)


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_stock_mapper_keeps_boxes_and_masks_together(small_splits, mask_format):
    """Also guards against whole numbers in the JSON, which Detectron2 would truncate."""
    mapper = DatasetMapper(
        is_train=True,
        augmentations=[T.Resize((333, 415)), T.RandomFlip(1.0)],
        image_format="BGR",
        use_instance_mask=True,
        instance_mask_format=mask_format,
    )
    num_objects = 0
    for record in DatasetCatalog.get("d2p_shapes_train"):
        instances = mapper(record)["instances"]
        boxes = instances.gt_boxes.tensor
        mask_boxes = instances.gt_masks.get_bounding_boxes().tensor
        torch.testing.assert_close(
            boxes, mask_boxes, atol=1e-3 if mask_format == "polygon" else 1.01, rtol=0
        )
        num_objects += len(boxes)
    assert num_objects > 30


def test_complete_folder_is_not_rendered_again(rendered, monkeypatch):
    folder, split = rendered
    assert find_problem(folder, split) is None
    monkeypatch.setattr(shapes_files, "render_image", None)
    assert ensure_split(split) == folder


def truncate_image(folder):
    path = folder / "images" / "000003.jpg"
    path.write_bytes(path.read_bytes()[:-7])


def change_json(folder):
    path = folder / "d2p_shapes_val.json"
    path.write_text(path.read_text().replace("1", "2", 1))


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda folder: (folder / "images/000002.jpg").unlink(), "images/000002.jpg is missing"),
        (truncate_image, "images/000003.jpg has a wrong size"),
        (change_json, "d2p_shapes_val.json has changed"),
        (
            lambda folder: (folder / "d2p_shapes_val.json").unlink(),
            "d2p_shapes_val.json is missing",
        ),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json is broken"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json is broken"),
    ],
)
def test_broken_folder_is_rendered_again(rendered, damage, problem):
    folder, split = rendered
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    damage(folder)
    assert find_problem(folder, split) == problem
    ensure_split(split)
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert after == before


def test_folder_of_another_length_is_rendered_again(rendered):
    folder, split = rendered
    longer = Split(split.name, split.seed, split.num_images + 1, split.categories)
    assert find_problem(folder, longer) == "6 images instead of 7"
    ensure_split(longer)
    assert len(list((folder / "images").iterdir())) == 7


def test_interrupted_rendering_leaves_nothing(small_splits, tmp_path, monkeypatch):
    real = shapes_files.render_image

    def interrupt(seed, index):
        if index == 3:
            raise KeyboardInterrupt
        return real(seed, index)

    monkeypatch.setattr(shapes_files, "render_image", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ensure_split(small_splits[1])
    root = shapes_files.dataset_root()
    assert [path.name for path in root.iterdir()] == ["val.lock"]

    # A killed process cannot tidy up: the next one does.
    (root / ".val-killed").mkdir()
    monkeypatch.setattr(shapes_files, "render_image", real)
    ensure_split(small_splits[1])
    assert sorted(path.name for path in root.iterdir()) == ["val", "val.lock"]


def test_one_of_several_processes_renders(small_splits, tmp_path, monkeypatch):
    real = shapes_files._write_split

    def counting(folder, split):
        with open(tmp_path / "calls", "a") as file:
            file.write("called\n")
        real(folder, split)

    monkeypatch.setattr(shapes_files, "_write_split", counting)
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=ensure_split, args=(small_splits[0],)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert (tmp_path / "calls").read_text() == "called\n"
    assert find_problem(shapes_files.dataset_root() / "train", small_splits[0]) is None


def test_root_that_cannot_be_written(small_splits, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "file"))
    with pytest.raises(
        OSError, match=r"file/d2p_shapes-v1': Not a directory. Set the .*DETECTRON2_DATASETS"
    ):
        DatasetCatalog.get("d2p_shapes_val")


def test_full_disk(small_splits, monkeypatch):
    def write_bytes(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(OSError, match="No space left on device. Set the .*DETECTRON2_DATASETS"):
        ensure_split(small_splits[1])
    assert [path.name for path in shapes_files.dataset_root().iterdir()] == ["val.lock"]


def test_read_only_folder_that_is_complete_is_used(rendered, monkeypatch):
    folder, split = rendered

    def deny(*args, **kwargs):
        raise PermissionError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(shapes_files, "file_lock", deny)
    assert ensure_split(split) == folder
    (folder / "manifest.json").unlink()
    with pytest.raises(OSError, match="Read-only file system. Set the .*DETECTRON2_DATASETS"):
        ensure_split(split)


def test_progress_is_logged(small_splits, monkeypatch, caplog):
    monkeypatch.setattr(shapes_files, "LOG_PERIOD", 0.0)
    with caplog.at_level(logging.INFO, logger="d2proposals"):
        ensure_split(small_splits[1])
    assert "Rendering val: 3/6, ETA" in caplog.text
    assert "Rendered 6 images of val" in caplog.text


def test_json_is_valid_coco(rendered):
    folder, _ = rendered
    content = json.loads((folder / "d2p_shapes_val.json").read_text())
    assert [c["name"] for c in content["categories"]] == list(CATEGORIES)
    assert [image["id"] for image in content["images"]] == [1, 2, 3, 4, 5, 6]
    ids = [annotation["id"] for annotation in content["annotations"]]
    assert ids == list(np.arange(len(ids)) + 1)
    keys = {"id", "image_id", "category_id", "iscrowd", "area", "bbox", "segmentation"}
    assert all(annotation.keys() == keys for annotation in content["annotations"])
