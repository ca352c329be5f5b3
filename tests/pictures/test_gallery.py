"""Tests of the gallery, and of masks in pictures."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_util

from d2proposals.pictures.coverage import ProposalPicture, find_covered, write_contact_sheet
from d2proposals.pictures.gallery import write_gallery

SIZE = (60, 90)
BOXES = np.array([[5, 5, 25, 45], [40, 10, 80, 50]], np.float32)


def encode(boxes):
    bitmaps = np.zeros((*SIZE, len(boxes)), np.uint8)
    for index, (x1, y1, x2, y2) in enumerate(np.asarray(boxes, int)):
        bitmaps[y1:y2, x1:x2, index] = 1
    return mask_util.encode(np.asfortranarray(bitmaps))


def make_picture(name="<1>", proposals=BOXES[:1], with_masks=False, size=SIZE):
    masks = (encode(BOXES), encode(proposals)) if with_masks else (None, None)
    image = np.full((*size, 3), 90, np.uint8)
    return ProposalPicture(name, image, BOXES, proposals, *masks)


def pictures_of(page):
    found = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    return [Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB") for data in found]


def test_one_file_that_needs_no_network(tmp_path):
    path = tmp_path / "new" / "gallery.html"
    pictures = (make_picture(name) for name in ("<1>", "two"))
    assert write_gallery(path, pictures, top=10, title="A & B") == (2, 4)
    page = path.read_text()
    bare = re.sub(r"base64,[^\"]+", "", page)
    assert not re.search(r"https?:|//\w|<link|@import|url\(|src=\"(?!data:)", bare)
    assert "image &lt;1&gt;: 1 of 2 objects covered" in page and "<h1>A &amp; B</h1>" in page
    assert "2 of 4 objects in 2 images are covered." in page and "best 10 proposals" in page
    assert re.findall(r'data-missed="(\d)" data-covered="(\d)"', page) == [("1", "1")] * 2
    assert [picture.size for picture in pictures_of(page)] == [(720, 480)] * 2
    assert [x.name for x in path.parent.iterdir()] == ["gallery.html"]


@pytest.mark.parametrize("size", [(1, 400), (400, 1), (1, 1)])
def test_images_of_odd_shapes(tmp_path, size):
    write_gallery(tmp_path / "a.html", [make_picture(size=size)])
    assert len(pictures_of((tmp_path / "a.html").read_text())) == 1


def test_no_pictures(tmp_path):
    with pytest.raises(ValueError, match="at least one image"):
        write_gallery(tmp_path / "a.html", [])
    assert not list(tmp_path.iterdir())


def test_masks_are_tinted_and_decide(tmp_path):
    """The best proposal's mask is yellow, the missed object's orange, the rest as it was."""
    write_gallery(tmp_path / "a.html", [make_picture(with_masks=True)])
    page = (tmp_path / "a.html").read_text()
    assert "Tinted" in page
    (picture,) = pictures_of(page)
    pixels = np.array(picture, int)
    covered, missed, beside = (pixels[y * 8, x * 8] for y, x in ((25, 15), (30, 60), (55, 30)))
    assert covered[0] > covered[2] + 40 and abs(covered[0] - covered[1]) < 20
    assert missed[0] > missed[1] + 30 > missed[2] + 30
    assert np.abs(beside - 90).max() <= 3
    write_contact_sheet(tmp_path / "sheet.png", [make_picture(with_masks=True)])
    assert Image.open(tmp_path / "sheet.png").size[0] > 300


def test_coverage_by_given_overlaps():
    overlaps = np.array([[0.2, 0.6], [0.9, 0.1]], np.float32)
    found = find_covered(BOXES, BOXES, 2, 0.5, overlaps)
    assert found.is_covered.tolist() == [True, True] and found.best_proposal.tolist() == [1, 0]
    found = find_covered(BOXES, BOXES, 1, 0.5, overlaps)
    assert found.is_covered.tolist() == [False, True]
