"""Ground truth of three images, and a file of proposals that finds all of it."""

import json

import pytest

from d2proposals.files.conversion import write_proposals
from tests.tools.proposal_commands import SIZE, perfect


@pytest.fixture
def gt(tmp_path):
    """Three images with a small square and a large one each, of two categories."""
    boxes = [[2, 3, 10, 10], [20, 5, 25, 30]]
    categories = [{"id": 3, "name": "cat"}, {"id": 9, "name": "dog"}]
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "height": SIZE[0], "width": SIZE[1]}
            for i in (1, 2, 3)
        ],
        "annotations": [
            {"id": 10 * i + j, "image_id": i, "bbox": box, "category_id": (3, 9)[j],
             "segmentation": [[box[0], box[1], box[0] + box[2], box[1], box[0] + box[2],
                               box[1] + box[3], box[0], box[1] + box[3]]]}
            for i in (1, 2, 3) for j, box in enumerate(boxes)
        ],
        "categories": categories,
    }  # fmt: skip
    path = tmp_path / "gt.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def perfect_file(tmp_path):
    path = tmp_path / "perfect.json"
    write_proposals(path, perfect(), "d2proposals")
    return path
