"""tools/write_windows.py."""

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from d2proposals.files.conversion import read_proposals
from tests.common import forgotten_datasets
from tools.write_windows import main


@pytest.fixture
def dataset():
    records = [
        {"image_id": 7, "file_name": "a.jpg", "height": 40, "width": 80, "annotations": []},
        {"image_id": 9, "file_name": "b.jpg", "height": 100, "width": 20, "annotations": []},
    ]
    DatasetCatalog.register("two_images", lambda: records)
    MetadataCatalog.get("two_images").set(thing_classes=["thing"])
    yield "two_images"
    DatasetCatalog.remove("two_images")
    MetadataCatalog.remove("two_images")


def test_windows_of_each_image_the_largest_first(dataset, tmp_path, capsys):
    output = tmp_path / "windows.pkl"
    main([str(output), "--dataset", dataset])
    proposals = read_proposals(output)
    assert proposals.image_ids == [7, 9]
    first, second = proposals.boxes
    assert len(first) == len(second) == 1 + 9 + 25
    assert first[0].tolist() == [0, 0, 80, 40] and second[0].tolist() == [0, 0, 20, 100]
    # Of half the sides: three along each axis, from edge to edge.
    assert first[1].tolist() == [0, 0, 40, 20] and first[9].tolist() == [40, 20, 80, 40]
    assert (proposals.scores[0][1:] < proposals.scores[0][:-1]).all()
    assert "70 windows of 2 images" in capsys.readouterr().out


def test_windows_of_a_file_of_annotations(tmp_path, capsys):
    file, output = tmp_path / "own.json", tmp_path / "windows.pkl"
    file.write_text('{"images": [{"id": 3, "file_name": "a.jpg", "height": 40, "width": 80}]}')
    with forgotten_datasets() as names:
        main([str(output), "--gt", str(file)])
        names += [name for name in DatasetCatalog.list() if str(file) in name]
    assert read_proposals(output).image_ids == [3]
    assert "35 windows of 1 images" in capsys.readouterr().out


def test_wrong_arguments(dataset, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path / "x.pkl"), "--dataset", dataset, "--overlap", "1"])
    assert "--overlap in [0, 1)" in capsys.readouterr().err
