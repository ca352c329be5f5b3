"""tools/select_images.py, and the list of photographs that comes with the results."""

import json

import pytest

from tests.common import ROOT
from tools.select_images import main


@pytest.fixture
def files(tmp_path):
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in (3, 5, 8)],
        "annotations": [{"id": i, "image_id": image} for i, image in enumerate((3, 8, 5, 8))],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (tmp_path / "all.json").write_text(json.dumps(content))
    (tmp_path / "ids.json").write_text(json.dumps({"one": [8], "two": [8, 3], "more": [8, 9]}))
    return tmp_path


def run(files, *arguments):
    main([str(files / "all.json"), str(files / "some.json"), "--ids", str(files / "ids.json"),
          *arguments])  # fmt: skip
    return json.loads((files / "some.json").read_text())


def test_images_of_a_list_and_their_objects_stay(files, capsys):
    chosen = run(files, "--list", "two")
    assert [image["id"] for image in chosen["images"]] == [3, 8]
    assert [item["id"] for item in chosen["annotations"]] == [0, 1, 3]
    assert chosen["categories"] == [{"id": 1, "name": "cat"}]
    assert capsys.readouterr().out.endswith("some.json: 2 images, 3 annotations\n")
    # As some editors write it, with a mark of its bytes' order in front.
    (files / "ids.json").write_text("[5]", encoding="utf-8-sig")
    assert [item["id"] for item in run(files)["annotations"]] == [2]


@pytest.mark.parametrize(
    ("text", "arguments", "line"),
    [
        (None, (), "has the lists one, two, more: name one by --list"),
        (None, ("--list", "more"), "1 of 2 images are not in the annotations, for example 9"),
        ('{"one": 3}', ("--list", "one"), "has no list of image ids"),
        ("[3", (), "ids.json is not JSON"),
    ],
)
def test_bad_lists_are_one_line(files, text, arguments, line):
    if text is not None:
        (files / "ids.json").write_text(text)
    with pytest.raises(SystemExit, match=f"^Error: .*{line}"):
        run(files, *arguments)
    assert not (files / "some.json").exists()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[]", "no lists 'images' and 'annotations'"),
        ('{"images": [{}], "annotations": []}', "one of the images has no 'id'"),
        ('{"images": [], "annotations": [{"id": 1}]}', "annotations has no 'image_id'"),
        (None, "all.json is missing"),
    ],
)
def test_bad_annotations_are_one_line(files, text, line):
    (files / "all.json").unlink()
    if text is not None:
        (files / "all.json").write_text(text)
    with pytest.raises(SystemExit, match=line):
        run(files, "--list", "one")


def test_the_photographs_of_the_results_are_apart():
    lists = json.loads((ROOT / "docs/results/coco_image_ids.json").read_text())
    assert {name: len(ids) for name, ids in lists.items()} == {
        "coco_2017_train": 337, "coco_boxes_small": 2584, "coco_2017_val": 134,
    }  # fmt: skip
    assert len(set().union(*lists.values())) == 337 + 2584 + 134
