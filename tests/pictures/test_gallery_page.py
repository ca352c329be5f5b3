"""Tests of the gallery's page in a browser: its numbers are the evaluator's, and it is safe."""

import json

import numpy as np
import pytest
from PIL import Image

from d2proposals.evaluation.proposal_checks import ImageProposals
from d2proposals.files.conversion import write_proposals
from d2proposals.files.precomputed_format import write_proposal_file
from d2proposals.files.proposal_set import ProposalSet
from d2proposals.files.segmentations import encode_segmentation
from d2proposals.pictures.gallery import write_gallery
from d2proposals.pictures.gallery_entries import GalleryImage, Objects
from tests.browser import NARROW, running_browser
from tests.common import run_tool

SIZE = (200, 260)
NUM_OURS, NUM_THEIRS = 40, 25
LIMITS = (1, 3, 17, 40)
HOSTILE = "</script><script>document.title='taken'</script><img src=http://127.0.0.1:9/x>"
CATEGORIES = ["cat", HOSTILE, "dog"]
IOUS = (50, 70)


@pytest.fixture(scope="module")
def page():
    with running_browser() as page:
        yield page


def as_masks(boxes):
    x1, y1, x2, y2 = np.asarray(boxes).T
    polygons = np.stack([x1, y1, x2, y1, x2, y2, x1, y2], axis=1).tolist()
    return [encode_segmentation([polygon], SIZE, "") for polygon in polygons]


def propose(rng, objects, number):
    """Boxes like the objects, several for each and of several qualities, whole pixels."""
    boxes = objects[rng.integers(0, len(objects), number)]
    sides = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    boxes = (boxes + rng.normal(0, 0.15, boxes.shape) * sides).round()
    corners = np.sort(boxes.reshape(-1, 2, 2), axis=1)
    corners[:, 1] = np.maximum(corners[:, 1], corners[:, 0] + 2)
    return np.clip(corners.reshape(-1, 4), 0, [*SIZE[::-1]] * 2).astype(np.float32)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A dataset with hostile names, a file of boxes and one of masks, and the page of both."""
    folder = tmp_path_factory.mktemp("gallery")
    rng = np.random.default_rng(3)
    images, annotations, ours, theirs = [], [], [], []
    for index in range(12):
        image_id = f"{index}<b>&\"'"
        name = f"{index} & <i>.png"
        Image.fromarray(rng.integers(0, 255, (*SIZE, 3), dtype=np.uint8)).save(folder / name)
        images.append({"id": image_id, "file_name": name, "height": SIZE[0], "width": SIZE[1]})
        # From small to large ones.
        sides = np.exp(rng.uniform(np.log(12), np.log(150), (6, 2)))
        low = rng.uniform(0, 1, (6, 2)) * (np.array(SIZE[::-1]) - sides)
        objects = np.concatenate([low, low + sides], axis=1).round()
        for number, (x1, y1, x2, y2) in enumerate(objects.tolist()):
            annotation = {
                "id": len(annotations) + 1, "image_id": image_id,
                "category_id": 1 + number % 3, "bbox": [x1, y1, x2 - x1, y2 - y1],
            }  # fmt: skip
            # Objects without a mask are not compared by masks.
            if number:
                annotation["segmentation"] = [[x1, y1, x2, y1, x2, y2, x1, y2]]
            annotations.append(annotation)
        # The last image has no proposals of ours.
        ours.append(propose(rng, objects, NUM_OURS if index < 11 else 0))
        theirs.append(propose(rng, objects, NUM_THEIRS))
    ids = [image["id"] for image in images]
    categories = [{"id": k + 1, "name": name} for k, name in enumerate(CATEGORIES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    gt = folder / "g<b>t.json"
    gt.write_text(json.dumps(content))
    paths = {"ours<i>": folder / "a.pkl", "theirs": folder / "b.json"}
    scores = [-np.arange(len(boxes), dtype=np.float32) for boxes in ours + theirs]
    write_proposal_file(paths["ours<i>"], ids, ours, scores[:12])
    masks = [as_masks(boxes) for boxes in theirs]
    own = ProposalSet("d2proposals", ids, theirs, scores[12:], masks, scores_are_logits=True)
    write_proposals(str(paths["theirs"]), own, "d2proposals")
    arguments = ["--gt", gt, "--seen", "cat", "--proposals"]
    arguments += [f"{name}={path}" for name, path in paths.items()]
    run_tool("evaluate_proposals", *arguments, "--limits", *LIMITS, "--output", folder / "measured")
    gallery = folder / "gallery.html"
    run_tool(
        "visualize_proposals", *arguments, "--image-root", folder, "--top", 17,
        "--num-images", 12, "--gallery", gallery,
    )  # fmt: skip
    measured = json.loads((folder / "measured" / "results.json").read_text())["runs"]
    return gallery, measured


def measures_of(page, run):
    row = f"#rows tr[data-run='{run}'] td"
    names = page.run(f"return [...document.querySelectorAll(`{row}`)].map(x => x.dataset.measure)")
    return dict(zip(names, page.texts(row), strict=True))


def expected_of(measured, run, k, iou=50, kind="box", task="all", size=""):
    """The evaluator's figures as its table has them."""
    results = list(measured.values())[run][f"{kind}_proposals"]["metrics_in_percent"][task]
    names = {"AR": f"AR{size}@{k}", "ABO": f"ABO{size and '-' + size}@{k}"}
    if not size:
        names["recall"] = f"Recall-IoU{iou}@{k}"
    return {name: f"{results[key]:.2f}" for name, key in names.items()}


def assert_measures(page, run, expected):
    shown = measures_of(page, run)
    assert {name: shown[name] for name in expected} == expected
    return shown


def test_sliders_change_the_numbers_to_the_evaluators(page, files):
    gallery, measured = files
    page.open(gallery)
    page.wait_for("#rows tr")
    assert page.run("return document.getElementById('top').max") == str(NUM_OURS)
    seen = set()
    for k in LIMITS:
        page.set("top", k)
        for iou in IOUS:
            page.set("iou", iou)
            for run in range(2):
                shown = assert_measures(page, run, expected_of(measured, run, k, iou))
                # 72 objects in all.
                covered = round(float(shown["recall"]) * 72 / 100)
                assert (int(shown["covered"]), int(shown["missed"])) == (covered, 72 - covered)
                seen.add((run, shown["recall"]))
    # The slider proper: its stops are numbers of proposals.
    assert len(seen) > 10
    page.run("window.stops = document.getElementById('top-slider').max")
    page.set("top-slider", 0)
    assert page.run("return document.getElementById('top').value") == "1"
    page.set("top-slider", page.run("return window.stops"))
    assert page.run("return document.getElementById('top').value") == str(NUM_OURS)
    assert_measures(page, 0, expected_of(measured, 0, NUM_OURS, IOUS[-1]))


@pytest.mark.parametrize(
    ("control", "value", "choice"),
    [
        ("size", "1", {"size": "s"}),
        ("size", "2", {"size": "m"}),
        ("size", "3", {"size": "l"}),
        ("seen", "seen", {"task": "seen"}),
        ("seen", "unseen", {"task": "unseen"}),
        # Of three categories one was seen.
        ("category", "0", {"task": "seen"}),
        ("kind", "mask", {"kind": "mask"}),
    ],
)
def test_choices_of_objects_are_the_evaluators(page, files, control, value, choice):
    gallery, measured = files
    page.open(gallery)
    page.wait_for("#rows tr")
    page.set(control, value)
    runs = range(2)
    if choice.get("kind") == "mask":
        assert measures_of(page, 0)["recall"] == "-"  # that file has boxes alone
        assert page.texts("#caption")[0].startswith("60 objects")
        runs = [1]
    for k in LIMITS:
        page.set("top", k)
        for run in runs:
            assert_measures(page, run, expected_of(measured, run, k, **choice))


def shown_names(page):
    return page.run(
        "return [...document.querySelectorAll('#grid figure:not([hidden])')]"
        ".map(figure => Number(figure.dataset.index))"
    )


def covered_numbers(page):
    """Per image, by its place in the dataset, the numbers of covered objects of both runs."""
    captions = page.run(
        "return [...document.querySelectorAll('#grid figure')].map(figure =>"
        " [Number(figure.dataset.index), figure.querySelector('figcaption span').textContent])"
    )
    numbers = {}
    for index, caption in captions:
        numbers[index] = [int(part.split()[-5]) for part in caption.split(";") if "covered" in part]
    return numbers


def test_found_by_one_and_missed_by_the_other(page, files):
    gallery, _ = files
    page.open(gallery)
    page.wait_for("#rows tr")
    page.set("order", "pair 1 0")
    # The last image has no proposals of ours: whatever theirs covers is missed by ours.
    numbers = covered_numbers(page)
    assert numbers[11][0] == 0 and shown_names(page)[0] == 11
    page.set("filter", "pair 0 1")
    assert 11 not in shown_names(page) and 0 < len(shown_names(page)) < 12
    page.set("filter", "missed")
    page.set("order", "missed")
    missed = [12 - sum(numbers[index]) for index in shown_names(page)]
    assert missed == sorted(missed, reverse=True) and missed[-1] > 0
    page.set("order", "covered")
    covered = [sum(numbers[index]) for index in shown_names(page)]
    assert covered == sorted(covered, reverse=True)
    # What the pair is about is marked.
    page.set("filter", "pair 1 0")
    page.set("order", "pair 1 0")
    marked = page.run(
        "return document.querySelector('#grid figure .wanted').getAttribute('d').split('Z').length"
    )
    assert marked - 1 == numbers[11][1]


def test_files_side_by_side_and_alone(page, files):
    gallery, _ = files
    page.open(gallery)
    page.wait_for("#grid figure svg path")
    count = (
        "return [...document.querySelectorAll('#grid figure:first-child .panel')]"
        ".map(panel => panel.hidden)"
    )
    assert page.run(count) == [False, False]
    assert page.texts("#grid figure:first-child .name") == ["ours<i>", "theirs"]
    page.press("2")
    assert page.run(count) == [True, False]
    assert page.run("return [...document.querySelectorAll('#runs input')].map(x => x.checked)") == [
        False, True,
    ]  # fmt: skip
    page.run("document.querySelectorAll('#runs input')[0].click()")
    page.settle()
    assert page.run(count) == [False, False]
    page.run("document.querySelectorAll('#runs input')[1].click()")
    page.settle()
    assert page.run(count) == [False, True]
    # One must stay.
    page.run("document.querySelectorAll('#runs input')[0].click()")
    page.settle()
    assert page.run(count) == [False, True]
    page.press("0")
    assert page.run(count) == [False, False]


def test_nothing_leaves_the_page_and_names_stay_text(page, files):
    gallery, _ = files
    page.open(gallery)
    page.wait_for("#grid figure svg path")
    page.set("others", "on")
    page.set("category", "1")
    page.press("\ue004", "j")
    assert all(url.startswith(("file://", "data:image/webp;")) for url in page.requests())
    assert page.complaints() == []
    options = page.texts("#category option")
    assert options[1:] == CATEGORIES
    assert page.driver.title == "Proposals on g<b>t.json"
    assert not page.texts("b, i") and page.texts("#grid figure:nth-child(2) .name")[0] == "ours<i>"
    captions = page.texts("#grid figcaption span")
    assert captions[3].startswith("image 3<b>&\"'; ours<i>: ")
    # Were there anything that asks for something outside, the policy would not let it.
    blocked = page.driver.execute_async_script(
        "const done = arguments[0];"
        "document.addEventListener('securitypolicyviolation', e => done(e.effectiveDirective));"
        "fetch('http://127.0.0.1:9/').catch(() => {});"
    )
    assert blocked == "connect-src"
    blocked = page.driver.execute_async_script(
        "const done = arguments[0];"
        "document.addEventListener('securitypolicyviolation', e => done(e.effectiveDirective));"
        "const script = document.createElement('script'); script.textContent = 'window.bad = 1';"
        "document.body.append(script);"
    )
    assert blocked.startswith("script-src") and page.run("return window.bad") is None


# Worked by hand: the first object is covered wholly by rank 1, and by half by rank 0; rank 2
# covers two thirds of the second; the third is met by nobody.
OBJECTS = np.array([[10, 10, 30, 30], [50, 10, 70, 30], [80, 40, 90, 50.26]], np.float32)
PROPOSALS = np.array([[10, 10, 30, 20], [10, 10, 30, 30], [54, 10, 74, 30]], np.float32)


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory):
    path = tmp_path_factory.mktemp("by_hand") / "gallery.html"
    image = GalleryImage(
        "7", np.full((60, 100, 3), 128, np.uint8),
        [ImageProposals(PROPOSALS, np.float32([2, 1, 0]), None)],
        Objects(OBJECTS, np.float32([400, 400, 100]), np.array([0, 0, 1])),
    )  # fmt: skip
    write_gallery(path, [image], runs=["ours"], category_names={0: "cat", 1: "dog"})
    return path


def paths(page, kind):
    return page.run(
        "return [...document.querySelectorAll(`#grid svg path.${arguments[0]}:not(.rim)`)]"
        ".map(path => path.getAttribute('d')).filter(d => d !== '')",
        kind,
    )


def test_what_is_drawn(page, by_hand):
    page.open(by_hand)
    page.wait_for("#grid svg path")
    assert paths(page, "covered") == ["M10 10H30V30H10ZM50 10H70V30H50Z"]
    assert paths(page, "proposal") == ["M10 10H30V30H10ZM54 10H74V30H54Z"]
    assert paths(page, "missed") == ["M80 40H90V50.3H80Z"]
    page.set("top", 1)
    assert paths(page, "proposal") == ["M10 10H30V20H10Z"]
    assert paths(page, "missed") == ["M50 10H70V30H50ZM80 40H90V50.3H80Z"]
    page.set("iou", 51)
    assert paths(page, "covered") == []
    # Recall over the number of proposals, with the slider's place in it.
    page.set("top", 2)
    label = page.run("return document.querySelector('#curve svg').getAttribute('aria-label')")
    assert label == "Recall at IoU 0.51, percent, over the number of proposals; with 2: ours 33.33"


def test_a_click_and_keys_say_what_is_known_of_an_object(page, by_hand):
    from selenium.webdriver.common.action_chains import ActionChains

    page.open(by_hand)
    page.wait_for("#grid svg path")
    picture = page.driver.find_element("css selector", ".picture")
    box = picture.rect
    # The middle of the second object, from the middle of the picture.
    offset = [round(box["width"] * (60 - 50) / 100), round(box["height"] * (20 - 30) / 60)]
    ActionChains(page.driver).move_to_element_with_offset(picture, *offset).click().perform()
    page.settle()
    assert page.texts(".detail") == [
        "object 2 of 3: cat, 20.0 x 20.0 pixels, small\nours: covered by proposal 3, IoU 0.667"
    ]
    assert paths(page, "chosen") == ["M50 10H70V30H50Z"]
    assert paths(page, "chosen-proposal") == ["M54 10H74V30H54Z"]
    page.set("top", 2)
    text = "missed; none of the best 2 meets it; best of all: proposal 3, IoU 0.667"
    assert page.texts(".detail")[0].endswith(f"ours: {text}")
    # Without a mouse: the image takes the focus, and arrows go through its objects.
    page.run("document.querySelector('#grid figure').focus()")
    page.press("\ue014")  # right
    assert page.texts(".detail")[0].endswith("dog, 10.0 x 10.3 pixels, small\nours: missed; no "
                                             "proposal meets it")  # fmt: skip
    page.press("\ue014")
    assert "proposal 2, IoU 1.000" in page.texts(".detail")[0]
    page.press("\ue00c")  # Escape
    assert page.run("return document.querySelector('.detail').hidden")
    page.press("\ue007")  # Enter
    assert page.run("return document.querySelector('#grid figure').className") == "large"
    page.press("[", ".")
    assert page.run("return document.getElementById('top').value") == "1"
    assert page.texts("#iou-value") == ["0.51"]


def test_another_object_takes_the_best_proposal(page, tmp_path):
    """Two like objects and one proposal: the second one's best is not its own."""
    image = GalleryImage(
        "7", np.full((60, 100, 3), 128, np.uint8),
        [ImageProposals(PROPOSALS[1:2], np.float32([2]), None)],
        Objects(OBJECTS[[0, 0]] + np.float32([[0], [1]]), np.float32([400, 400]), np.zeros(2, int)),
    )  # fmt: skip
    write_gallery(tmp_path / "a.html", [image], runs=["ours"])
    page.open(tmp_path / "a.html")
    page.wait_for("#grid svg path")
    page.run("document.querySelector('#grid figure').focus()")
    page.press("\ue012")  # left: the last one
    assert (
        "missed; best of 1: proposal 1, IoU 0.822; which another object takes"
        in (page.texts(".detail")[0])
    )
    assert measures_of(page, 0)["recall"] == "50.00"


@pytest.fixture(scope="module")
def without_objects(tmp_path_factory):
    """Two photographs without ground truth, of 3 proposals with masks and of none."""
    path = tmp_path_factory.mktemp("ranks") / "gallery.html"
    boxes = np.float32([[10, 10, 200, 150], [40, 20, 90, 60], [100, 100, 250, 190]])
    found = ImageProposals(boxes, np.float32([2, 0, -1]), None, as_masks(boxes))
    none = ImageProposals(boxes[:0], np.zeros(0, np.float32), None, [])
    grey = np.full((*SIZE, 3), 100, np.uint8)
    images = [GalleryImage("<a>.jpg", grey, [found]), GalleryImage("b.jpg", grey, [none])]
    write_gallery(path, images, runs=["zip"], top=20)
    return path


def test_photographs_without_ground_truth_show_ranks_and_scores(page, without_objects):
    page.open(without_objects)
    page.wait_for("#grid svg path")
    assert page.run("return document.getElementById('numbers').hidden")
    assert not page.driver.find_element("id", "iou").is_displayed()
    # The slider ends at what there is; 1 / (1 + exp(-2)) = .881.
    assert page.run("return document.getElementById('top').max") == "3"
    assert page.texts("#grid figcaption span") == [
        "image <a>.jpg; 3 of 3 proposals, scores 0.881 to 0.269", "image b.jpg; no proposals",
    ]  # fmt: skip
    colours = "return [...document.querySelectorAll('#grid svg path.ranked:not(.rim):not(.tint)')]"
    colours += ".filter(path => path.getAttribute('d')).map(path => path.style.stroke)"
    assert len(set(page.run(colours))) == 3
    assert page.run(colours)[-1] == "rgb(253, 231, 37)"  # the best, bright, above the others
    page.set("top", 2)
    assert "2 of 3 proposals, scores 0.881 to 0.500" in page.texts("#grid figcaption span")[0]
    assert len(page.run(colours)) == 2
    tints = "return [...document.querySelectorAll('#grid svg path.tint')].map(p =>"
    tints += " p.getAttribute('d')).filter(Boolean).length"
    assert page.run(tints) == 2
    page.run("document.querySelector('#grid figure').focus()")
    page.press("\ue014", "\ue014")
    assert page.texts(".detail")[0] == "proposal 2 of 3: score 0.500, 50.0 x 40.0 pixels"
    # No longer among the best: nothing is chosen.
    page.set("top", 1)
    assert page.texts(".detail")[0] == ""
    assert page.complaints() == []


@pytest.mark.parametrize("size", [NARROW, (1300, 900)])
def test_windows_and_controls(page, files, size, tmp_path):
    gallery, _ = files
    page.open(gallery, size)
    page.wait_for("#rows tr")
    assert page.run("return document.documentElement.scrollWidth") <= size[0]
    # The sliders are in sight wherever the page is.
    page.run("window.scrollTo(0, document.body.scrollHeight)")
    page.wait_for("#grid svg path")
    page.settle()
    top = page.run("return document.getElementById('top-slider').getBoundingClientRect().top")
    assert 0 <= top < size[1]
    controls = page.driver.find_elements("css selector", "input, select, button, #grid figure")
    for control in controls:
        if control.tag_name != "figure" and control.is_displayed():
            assert control.accessible_name.strip(), control.get_attribute("outerHTML")
    page.driver.save_screenshot(str(tmp_path / "page.png"))
    pixels = np.array(Image.open(tmp_path / "page.png").convert("RGB"), int)
    # The colour of missed objects is on the screen.
    assert (np.abs(pixels - [0xD5, 0x5E, 0x00]).max(axis=2) < 8).sum() > 50


def test_ties_are_rounded_as_in_python(page, files, tmp_path):
    """One of 32 objects is 3.125 %, which Python prints as 3.12."""
    boxes = np.tile(np.float32([0, 0, 8, 8]), (32, 1)) + np.float32(10) * np.arange(32)[:, None]
    image = GalleryImage(
        "1", np.zeros((330, 330, 3), np.uint8), [ImageProposals(boxes[:1], np.zeros(1), None)],
        Objects(boxes, np.full(32, 64, np.float32), np.zeros(32, int)),
    )  # fmt: skip
    write_gallery(tmp_path / "a.html", [image], runs=["ours"])
    page.open(tmp_path / "a.html")
    page.wait_for("#rows tr")
    assert measures_of(page, 0)["recall"] == measures_of(page, 0)["AR"] == f"{100 / 32:.2f}"


def test_masks_decide_where_all_have_them(page, tmp_path):
    """The proposal's box is the object's, its mask another one: covered by boxes alone."""
    halves = as_masks([[10, 10, 30, 60], [40, 10, 60, 60]])
    whole = np.float32([[10, 10, 60, 60]])
    image = GalleryImage(
        "1", np.zeros((*SIZE, 3), np.uint8),
        [ImageProposals(whole, np.zeros(1, np.float32), None, halves[1:])],
        Objects(whole, np.float32([2500]), np.zeros(1, int), halves[:1]),
    )  # fmt: skip
    write_gallery(tmp_path / "a.html", [image], runs=["ours"])
    page.open(tmp_path / "a.html")
    page.wait_for("#grid svg path")
    assert measures_of(page, 0)["covered"] == "0"
    assert paths(page, "tint.missed") == ["M10.5 10.5 10.5 59.5 29.5 59.5 29.5 10.5Z"]
    page.set("kind", "box")
    assert measures_of(page, 0)["covered"] == "1" and paths(page, "tint.missed") == []
