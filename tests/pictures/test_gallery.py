"""Tests of the gallery's file, and of masks in pictures; its page is tested in a browser."""

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_util

from d2proposals.evaluation.proposal_checks import ImageProposals
from d2proposals.pictures import gallery
from d2proposals.pictures.coverage import ProposalPicture, find_covered, write_contact_sheet
from d2proposals.pictures.gallery import write_gallery
from d2proposals.pictures.gallery_entries import GalleryImage, Objects, entry_of

SIZE = (60, 90)
BOXES = np.array([[5, 5, 25, 45], [40, 10, 80, 50]], np.float32)


def encode(boxes):
    bitmaps = np.zeros((*SIZE, len(boxes)), np.uint8)
    for index, (x1, y1, x2, y2) in enumerate(np.asarray(boxes, int)):
        bitmaps[y1:y2, x1:x2, index] = 1
    return mask_util.encode(np.asfortranarray(bitmaps))


def make_proposals(boxes=BOXES[:1], masks=None):
    boxes = np.asarray(boxes, np.float32)
    return ImageProposals(boxes, -np.arange(len(boxes), dtype=np.float32), None, masks)


def make_image(name="<1>", size=SIZE, proposals=None, categories=(0, 1), masks=None):
    objects = Objects(BOXES, np.float32([800, 1600]), np.array(categories), masks)
    image = np.full((*size, 3), 90, np.uint8)
    return GalleryImage(name, image, [proposals or make_proposals()], objects)


class Parts(HTMLParser):
    """The texts of elements by name, and all attributes."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.texts, self.attributes, self.tags, self.is_open = {}, [], [], False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.texts.setdefault(tag, []).append("")
        self.is_open = True

    def handle_endtag(self, tag):
        self.is_open = False

    def handle_data(self, data):
        if self.is_open:
            self.texts[self.tags[-1]][-1] += data


def write(path, images=None, **arguments):
    write_gallery(path, images or [make_image()], **{"runs": ["ours"], **arguments})
    return Parts(path.read_text())


def data_of(parts):
    return json.loads(parts.texts["script"][0])


def decoded(text, kind):
    return np.frombuffer(base64.b64decode(text), kind)


def test_one_file_that_needs_no_network(tmp_path):
    path = tmp_path / "new" / "gallery.html"
    parts = write(path, title="A & B", about="<p>", category_names={0: "</script><b>"})
    assert [x.name for x in path.parent.iterdir()] == ["gallery.html"]
    assert parts.texts["h1"][0].strip() == parts.texts["title"][0] == "A & B"
    # Nothing names a source outside, and what runs is what the policy names by its hash.
    assert not [x for x in parts.attributes if x[0] in ("src", "style") or x[0].startswith("on")]
    assert [x[1] for x in parts.attributes if x[0] == "href"] == ["#grid"]
    policy = next(value for _, value in parts.attributes if value and "default-src" in value)
    for tag, index in (("script", 1), ("style", 0)):
        digest = hashlib.sha256(parts.texts[tag][index].encode()).digest()
        assert f"{tag}-src 'sha256-{base64.b64encode(digest).decode()}'" in policy
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    script = parts.texts["script"][1]
    assert not re.search(r"^(import|export)\b", script, re.MULTILINE)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", script)
    data = data_of(parts)
    assert data["about"] == "<p>" and data["images"][0]["name"] == "<1>"
    assert [x["name"] for x in data["categories"]] == ["</script><b>", "category 1"]
    assert parts.tags.count("script") == 2 and "b" not in parts.tags


def test_what_is_drawn_and_counted_of_an_image():
    boxes = [[5, 5, 25.04, 45], [np.nan] * 4, [-3, 8, 95, 70], [80, 10, 40, 50], [40, 10, 80, 50]]
    entry = entry_of(make_image(proposals=make_proposals(boxes)), keep=4)
    run = entry["runs"][0]
    assert (entry["height"], entry["width"], entry["unit"]) == (60, 90, 0.1)
    # Tenths of a pixel, within the image; what cannot be scored keeps its rank, as a point.
    drawn = decoded(run["boxes"], "<u2").reshape(-1, 4).tolist()
    assert drawn == [[50, 50, 250, 450], [0] * 4, [0, 80, 900, 600], [0] * 4]
    np.testing.assert_array_equal(decoded(run["logits"], "<f4"), [0, -1, -2, -3])
    assert decoded(run["box"]["gt"], "<u2").tolist() == [0]
    assert decoded(run["box"]["iou"], "<f4")[0] == pytest.approx(800 / 801.6)
    # The fifth is not among those that are kept, and the big one is the second object's best.
    assert decoded(run["box"]["best_gt"], "<u2").tolist() == [0, 1]
    assert decoded(run["box"]["best_rank"], "<u2").tolist() == [0, 2]
    photograph = Image.open(io.BytesIO(base64.b64decode(entry["photograph"])))
    assert photograph.size == (90, 60) and photograph.format == "WEBP"


def test_masks_of_objects_that_have_one():
    masks = list(encode(BOXES))
    proposals = make_proposals(BOXES, masks)
    entry = entry_of(make_image(proposals=proposals, masks=[None, masks[1]]), keep=10)
    # Rank 1 covers object 1; the first object has no mask, so that rank 0 plays no part.
    pairs = entry["runs"][0]["mask"]
    assert decoded(pairs["gt"], "<u2").tolist() == decoded(pairs["rank"], "<u2").tolist() == [1]
    assert list(entry["runs"][0]["masks"]) == [1]
    assert entry["objects"]["masks"][0] is None and entry["objects"]["masks"][1].startswith("M")
    # Without ground truth all are shown.
    entry = entry_of(make_image(proposals=proposals)._replace(objects=None), keep=10)
    assert entry["objects"] is None and list(entry["runs"][0]["masks"]) == [0, 1]
    assert "box" not in entry["runs"][0]


@pytest.mark.parametrize("size", [(1, 4000), (4000, 1), (1, 1)])
def test_images_of_odd_shapes(size):
    entry = entry_of(make_image(size=size), keep=10)
    photograph = Image.open(io.BytesIO(base64.b64decode(entry["photograph"])))
    assert max(photograph.size) == min(max(size), 640) and min(photograph.size) == 1


def test_boxes_of_an_image_too_large_for_tenths():
    image = make_image(size=(1, 20_000), proposals=make_proposals([[5, 0, 19_999, 1]]))
    entry = entry_of(image, keep=10)
    x1, _, x2, _ = decoded(entry["runs"][0]["boxes"], "<u2") * entry["unit"]
    assert (x1, x2) == pytest.approx((5, 19_999), abs=entry["unit"])


def test_categories_that_were_not_trained_on(tmp_path):
    images = [make_image(categories=(3, -1))]
    for unseen, expected in (({3}, [False, True]), ((), [None, None])):
        parts = write(tmp_path / "a.html", images, category_names={3: "cat"}, unseen=unseen)
        categories = data_of(parts)["categories"]
        assert [x["name"] for x in categories] == ["no category", "cat"]
        assert [x["unseen"] for x in categories] == expected


def test_a_large_page_says_what_to_reduce(tmp_path, monkeypatch, caplog):
    write(tmp_path / "a.html")
    assert not caplog.messages
    monkeypatch.setattr(gallery, "_LARGE_BYTES", 1000)
    write(tmp_path / "a.html")
    (message,) = caplog.messages
    assert "fewer images (now 1)" in message and "--keep, now 1000" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": []}, "at least one image"),
        ({"keep": 0}, "from 1 to 2000 .* not 0 and 100"),
        ({"top": 0}, "at least 1, not 1000 and 0"),
        ({"iou_threshold": 0.4}, "from .5 to 1, not 0.4"),
        ({"images": [make_image()._replace(image=np.zeros((4, 4)))]}, r"image <1> has the shape"),
    ],
)
def test_wrong_input(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        arguments = {"images": [make_image()], "runs": ["ours"], **arguments}
        write_gallery(tmp_path / "a.html", **arguments)
    assert not list(tmp_path.iterdir())


def test_masks_are_tinted_on_the_sheet_and_decide(tmp_path):
    """The best proposal's mask is yellow, the missed object's orange, the rest as it was."""
    image = np.full((*SIZE, 3), 90, np.uint8)
    picture = ProposalPicture("1", image, BOXES, BOXES[:1], encode(BOXES), encode(BOXES[:1]))
    write_contact_sheet(tmp_path / "sheet.png", [picture])
    pixels = np.array(Image.open(tmp_path / "sheet.png").convert("RGB"), int)
    greys = (np.abs(pixels - 90) <= 3).all(axis=2)
    rows, columns = np.flatnonzero(greys.any(axis=1)), np.flatnonzero(greys.any(axis=0))
    origin, scale = (rows[0], columns[0]), (columns[-1] - columns[0] + 1) / SIZE[1]
    covered, missed, beside = (
        pixels[round(origin[0] + y * scale), round(origin[1] + x * scale)]
        for y, x in ((25, 15), (30, 60), (55, 30))
    )
    assert covered[0] > covered[2] + 40 and abs(covered[0] - covered[1]) < 20
    assert missed[0] > missed[1] + 30 > missed[2] + 30
    assert np.abs(beside - 90).max() <= 3


def test_coverage_by_given_overlaps():
    overlaps = np.array([[0.2, 0.6], [0.9, 0.1]], np.float32)
    found = find_covered(BOXES, BOXES, 2, 0.5, overlaps)
    assert found.is_covered.tolist() == [True, True] and found.best_proposal.tolist() == [1, 0]
    found = find_covered(BOXES, BOXES, 1, 0.5, overlaps)
    assert found.is_covered.tolist() == [False, True]
