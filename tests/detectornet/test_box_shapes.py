"""Aspect ratios by k-means: hand-worked clusters, what counts, the command's configuration."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode

from d2proposals.detectornet.box_shapes import cluster_aspect_ratios, dataset_aspect_ratios
from tests.common import CONFIGS, forgotten_datasets, make_cfg

TOOL = Path(__file__).resolve().parents[2] / "tools" / "estimate_box_shapes.py"


def annotation(*box, mode=BoxMode.XYWH_ABS, **extra):
    return {"bbox": list(box), "bbox_mode": mode, **extra}


def test_ratios_of_objects():
    records = [
        {"annotations": [annotation(5, 5, 20, 10), annotation(1, 1, 9, 9, iscrowd=1)]},
        {"annotations": [annotation(0, 0, 10, 40, mode=BoxMode.XYXY_ABS), annotation(0, 0, 0, 3)]},
        {"annotations": []},
        {},
    ]
    assert dataset_aspect_ratios(records).tolist() == [2.0, 0.25]
    assert dataset_aspect_ratios([]).shape == (0,)


def test_clusters_by_hand():
    # Means of the logarithms: 1/2 and 1/8 give 1/4, 2 and 8 give 4.
    ratios = np.array([8, 0.5, 2, 0.125])
    np.testing.assert_allclose(cluster_aspect_ratios(ratios, 2), [0.25, 4])
    np.testing.assert_allclose(cluster_aspect_ratios(ratios, 4), [0.125, 0.5, 2, 8])


def test_clusters_are_symmetric_and_repeatable():
    ratios = np.exp(np.random.default_rng(0).normal(0, 0.7, 5000))
    ratios = np.concatenate([ratios, 1 / ratios])
    centers = cluster_aspect_ratios(ratios, 10)
    np.testing.assert_allclose(centers, (1 / centers)[::-1], rtol=1e-2)
    assert (np.diff(centers) > 0).all()
    np.testing.assert_array_equal(cluster_aspect_ratios(ratios[::-1], 10), centers)


def test_many_equal_boxes():
    ratios = np.array([1.0] * 100 + [2.0, 4.0])
    np.testing.assert_allclose(cluster_aspect_ratios(ratios, 3), [1, 2, 4])
    with pytest.raises(ValueError, match="4 clusters among 3 different"):
        cluster_aspect_ratios(ratios, 4)
    with pytest.raises(ValueError, match="1 clusters among 0"):
        cluster_aspect_ratios(np.zeros(0), 1)


@pytest.fixture
def dataset():
    boxes = [annotation(0, 0, w, 10) for w in (5, 10, 20, 40)]
    DatasetCatalog.register("boxes_of_a_test", lambda: [{"annotations": boxes}])
    yield "boxes_of_a_test"
    DatasetCatalog.remove("boxes_of_a_test")


def test_the_command_writes_a_configuration(dataset, tmp_path, capsys):
    main = runpy.run_path(str(TOOL))["main"]
    output = tmp_path / "box_shapes.yaml"
    main(["--dataset", dataset, "--number", "4", "--output", str(output)])
    assert "4 aspect ratios of 4 boxes" in capsys.readouterr().out
    cfg = make_cfg("detectornet_rpn_only.yaml")
    # As an element of _BASE_, behind the configuration.
    both = tmp_path / "both.yaml"
    base = CONFIGS / "detectornet_rpn_only.yaml"
    both.write_text(f'_BASE_: ["{base}", "{output}"]\n')
    cfg.merge_from_file(str(both))
    assert cfg.MODEL.DETECTORNET.ASPECT_RATIOS == (0.5, 1.0, 2.0, 4.0)
    with pytest.raises(SystemExit) as stop:
        main(["--dataset", dataset, "--number", "5", "--output", str(tmp_path / "no.yaml")])
    assert "5 clusters among 4" in str(stop.value) and not (tmp_path / "no.yaml").exists()


def test_the_command_reads_files_of_annotations(tmp_path):
    main = runpy.run_path(str(TOOL))["main"]
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file, width in zip(files, (20, 5), strict=True):
        objects = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, width, 10]}]
        content = {"images": [{"id": 1, "height": 50, "width": 50}], "annotations": objects}
        file.write_text(json.dumps(content))
    output = tmp_path / "box_shapes.yaml"
    with forgotten_datasets() as names:
        main(["--gt", *map(str, files), "--number", "2", "--output", str(output)])
        names += [name for name in DatasetCatalog.list() if str(tmp_path) in name]
    written = output.read_text()
    assert "2 boxes of" in written and "[0.5, 2.0]" in written
