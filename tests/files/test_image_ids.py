"""Tests of what the ids of a file of proposals mean."""

import json
import pickle

import numpy as np
import pytest
from pycocotools import mask as mask_util

from d2proposals.files.conversion import merge_images, read_proposals, write_proposals
from d2proposals.files.proposal_set import DatasetImages, ProposalSet

NAMES = ["000000000139.jpg", "000000000285.jpg"]


def images(ids, names):
    return DatasetImages(ids, names, [(10, 10)] * len(ids))


@pytest.mark.parametrize(
    ("dataset", "ids", "expected"),
    [
        # As they stand, also where a stem is another image's id.
        (images([1, 2], ["2.jpg", "1.jpg"]), [1, "2"], [1, 2]),
        # Stems with leading zeros, for ids that are these numbers and for ids that are not.
        (images([139, 285], NAMES), ["000000000139", "000000000285"], [139, 285]),
        (images([1, 2], NAMES), ["000000000285", "000000000139"], [2, 1]),
        (images([139, 285], ["", ""]), ["000000000139", "0285"], [139, 285]),
        (images([1, 2], NAMES), [139, 285], [1, 2]),
        # The dataset's are text, the file's are numbers.
        (images(["000000000139", "000000000285"], NAMES), [285, 139.0], ["000000000285",
                                                                         "000000000139"]),
        # Names with and without folder and suffix.
        (images([1, 2], ["x/a.png", "x/b.png"]), ["b", "x/a.png"], [2, 1]),
        (images([1, 2], ["x\\a.png", "y\\a.png"]), ["y/a.jpg", "x/a.png"], [2, 1]),
        # Some are of another split: what stands for itself stays.
        (images([139, 285], NAMES), ["139", "000000000285", "77"], [139, 285, "77"]),
        (images([1, 2], ["2.jpg", "1.jpg"]), [1, "2", "x"], [1, 2, "x"]),
        # Numbers of other images are not taken for numbers in file names.
        (images([1, 2], NAMES), [1, 2, 139], [1, 2, 139]),
        # A 1-based file of a dataset that counts from 0, with the numbers of its files.
        (images([0, 1], ["1.jpg", "2.jpg"]), [1, 2], [0, 1]),
        (images([7, 8], ["a.jpg", "b.jpg"]), ["c", 9, 7.5], ["c", 9, 7.5]),
        (images([1, 2], ["x/a.jpg", "y/a.jpg"]), ["a"], ["a"]),
        (images([1, "01"], ["", ""]), ["001"], ["001"]),
    ],
)  # fmt: skip
def test_ids_mean_the_image_that_is_meant(dataset, ids, expected):
    assert dataset.resolve(ids) == (expected, [])


def test_ids_that_could_mean_two_images_are_left_and_named(tmp_path):
    dataset = images([139, 285, 3], [NAMES[1], NAMES[0], "c.jpg"])
    assert dataset.resolve(["000000000139"]) == (["000000000139"], ["000000000139"])
    assert dataset.resolve(["000000000139", 3, "x"])[1] == ["000000000139"]
    path = tmp_path / "a.json"
    entry = {"image_id": "000000000139", "bbox": [0, 0, 1, 1], "score": 1}
    path.write_text(json.dumps([entry]))
    faults = read_proposals(path, dataset).faults
    assert [fault.name for fault in faults] == ["ambiguous-images"]
    assert "000000000139" in faults[0].message


@pytest.mark.parametrize("format_name", ["detectron2", "coco", "d2proposals", "mmdet3", "sam"])
def test_every_format_finds_its_images(tmp_path, format_name):
    mask = mask_util.encode(np.ones((10, 10), np.uint8, order="F"))
    proposals = ProposalSet(
        "d2proposals",
        ["000000000285", "000000000139"],
        [np.float32([[0, 0, 10, 10]])] * 2,
        [np.zeros(1), np.ones(1)],
        [[mask], [mask]],
        scores_are_logits=True,
    )
    path = tmp_path / "file"
    write_proposals(path, proposals, format_name)
    for dataset in (images([139, 285], ["", ""]), images([139, 285], NAMES)):
        result = merge_images(read_proposals(path, dataset), dataset)
        assert result.image_ids == [139, 285]
        assert [len(boxes_i) for boxes_i in result.boxes] == [1, 1]
        assert result.scores[0][0] > result.scores[1][0]


def test_whole_numbers_with_a_point(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"image_id": 2.0, "bbox": [0, 0, 1, 1], "score": 1}]')
    assert read_proposals(path).image_ids == [2]
    path.write_text('{"format": "d2proposals", "version": 1, "proposals": '
                    '[{"image_id": 2.0, "boxes": [], "objectness_logits": []}]}')  # fmt: skip
    assert read_proposals(path).image_ids == [2]
    content = {"ids": np.array([1.0, 2.0]), "boxes": [np.zeros((0, 4))] * 2,
               "objectness_logits": [np.zeros(0)] * 2}  # fmt: skip
    path.write_bytes(pickle.dumps(content))
    assert read_proposals(path).image_ids == [1, 2]
    path.write_text('[{"image_id": 2.5, "bbox": [0, 0, 1, 1], "score": 1}]')
    with pytest.raises(ValueError, match="an image_id is an integer or text, not 2.5"):
        read_proposals(path)
