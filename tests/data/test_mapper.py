"""Tests of d2proposals.data.mapper."""

import copy

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import transforms as T
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.roi_heads.roi_heads import StandardROIHeads
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances
from detectron2.utils.events import EventStorage
from PIL import Image
from pycocotools import mask as mask_util

from d2proposals import add_d2proposals_config
from d2proposals.data.mapper import CrowdRegions, ProposalDatasetMapper

HEIGHT, WIDTH = 100, 200


def make_mapper(*overrides, is_train=True):
    cfg = get_cfg()
    add_d2proposals_config(cfg)
    cfg.INPUT.MIN_SIZE_TRAIN = (50,)
    cfg.INPUT.MIN_SIZE_TEST = 50
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.merge_from_list(list(overrides))
    return ProposalDatasetMapper(cfg, is_train)


def annotation(box, category_id=0, polygon=True, **more):
    x1, y1, x2, y2 = box
    ret = {"bbox": list(box), "bbox_mode": BoxMode.XYXY_ABS, "category_id": category_id, **more}
    if polygon:
        ret["segmentation"] = [[x1, y1, x2, y1, x2, y2, x1, y2]]
    return ret


def crowd_annotation(box):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    x1, y1, x2, y2 = box
    mask[y1:y2, x1:x2] = 1
    return {**annotation(box, iscrowd=1), "segmentation": mask_util.encode(mask)}


@pytest.fixture
def dataset_dict(tmp_path):
    """An image of 200 x 100 pixels with two objects and a crowd region."""
    file_name = str(tmp_path / "image.png")
    Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8)).save(file_name)
    return {
        "file_name": file_name,
        "height": HEIGHT,
        "width": WIDTH,
        "image_id": 1,
        "annotations": [
            annotation((10, 10, 30, 50), category_id=4, area=123.5),
            crowd_annotation((100, 20, 180, 60)),
            annotation((40, 20, 80, 30), category_id=2),
        ],
    }


def test_stock_fields_and_ours(dataset_dict):
    before = copy.deepcopy(dataset_dict)
    out = make_mapper()(dataset_dict)
    assert out["image"].shape == (3, 50, 100)
    instances = out["instances"]
    assert set(instances.get_fields()) == {"gt_boxes", "gt_classes", "gt_areas", "crowd_regions"}
    torch.testing.assert_close(
        instances.gt_boxes.tensor, torch.tensor([[5.0, 5, 15, 25], [20, 10, 40, 15]])
    )
    assert instances.gt_classes.tolist() == [4, 2]
    assert repr(before) == repr(dataset_dict), "the dataset's dict must stay as it was"


@pytest.mark.parametrize(
    ("overrides", "input_size", "native_size"),
    [
        ((), (50, 100), (HEIGHT, WIDTH)),
        (("INPUT.RANDOM_FLIP", "horizontal"), (50, 100), (HEIGHT, WIDTH)),
        (("INPUT.WARP_SIZE", (33, 47)), (33, 47), (HEIGHT, WIDTH)),
        (("INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "absolute", "INPUT.CROP.SIZE", (40, 90)),
         (50, 113), (40, 90)),
    ],
)  # fmt: skip
def test_native_size_is_what_the_network_input_shows(
    dataset_dict, overrides, input_size, native_size
):
    for _ in range(3):
        out = make_mapper(*overrides)(dataset_dict)
        assert tuple(out["image"].shape[1:]) == input_size
        assert out["native_size"] == native_size
        assert (out["height"], out["width"]) == (HEIGHT, WIDTH)
    assert "native_size" not in make_mapper(is_train=False)(dataset_dict)


def test_integer_annotations_are_not_truncated(dataset_dict):
    dataset_dict["annotations"] = [annotation((11, 11, 31, 51))]
    instances = make_mapper("INPUT.USE_INSTANCE_MASK", True)(dataset_dict)["instances"]
    expected = [5.5, 5.5, 15.5, 25.5]
    assert instances.gt_boxes.tensor.tolist() == [expected]
    assert instances.gt_masks.get_bounding_boxes().tensor.tolist() == [expected]


def test_areas_are_annotated_else_masks_else_boxes(dataset_dict):
    triangle = annotation((0, 0, 20, 20))
    triangle["segmentation"] = [[0, 0, 20, 0, 0, 20]]
    encoded = {**annotation((0, 0, 20, 20)), "segmentation": crowd_annotation((0, 0, 7, 3))}
    encoded["segmentation"] = encoded["segmentation"]["segmentation"]
    boxed = annotation((0, 0, 20, 10), polygon=False)
    xywh = {**boxed, "bbox": [5, 5, 6, 7], "bbox_mode": BoxMode.XYWH_ABS}
    dataset_dict["annotations"] += [triangle, encoded, boxed, xywh]
    areas = make_mapper()(dataset_dict)["instances"].gt_areas
    assert areas.dtype == torch.float32
    # Pixels of the original image, although the network input is half as large.
    assert areas.tolist() == [123.5, 400, 200, 21, 200, 42]


def test_objects_that_the_transforms_leave_empty_take_their_areas_along(dataset_dict):
    outside = annotation((220, 10, 260, 30), category_id=7)
    dataset_dict["annotations"].insert(0, outside)
    dataset_dict["annotations"].insert(2, copy.deepcopy(outside))
    instances = make_mapper()(dataset_dict)["instances"]
    assert instances.gt_classes.tolist() == [4, 2]
    assert instances.gt_areas.tolist() == [123.5, 400]


@pytest.mark.parametrize("use_masks", [False, True])
def test_crowd_stays_apart(dataset_dict, use_masks):
    overrides = ("INPUT.USE_INSTANCE_MASK", use_masks, "INPUT.RANDOM_FLIP", "horizontal")
    mapper = make_mapper(*overrides)
    mapper.augmentations.augs[-1].prob = 1.0
    instances = mapper(dataset_dict)["instances"]
    crowd = instances.crowd_regions
    assert len(instances) == len(crowd) == 2
    # Halved, then flipped in the 100 pixels: x = 100 - 90 and 100 - 50.
    torch.testing.assert_close(crowd.boxes.tensor, torch.tensor([[10.0, 10, 50, 30]]))
    assert instances.has("gt_masks") == use_masks
    if not use_masks:
        assert crowd.masks is None
        return
    expected = torch.zeros(1, 50, 100, dtype=torch.bool)
    expected[0, 10:30, 10:50] = True
    assert torch.equal(crowd.masks.tensor, expected)


def test_crowd_regions_know_their_class(dataset_dict):
    dataset_dict["annotations"].append({**crowd_annotation((0, 0, 20, 20)), "category_id": 7})
    dataset_dict["annotations"][1]["category_id"] = 5
    crowd = make_mapper("INPUT.USE_INSTANCE_MASK", True)(dataset_dict)["instances"].crowd_regions
    assert crowd.classes.tolist() == [5, 7] and crowd[[0]].classes.tolist() == [5, 7]
    assert crowd.to("cpu").classes.tolist() == [5, 7] and len(crowd) == 2
    only = crowd.of_class(7)
    assert only.classes.tolist() == [7] and len(only) == 2 and len(only.masks) == 1
    assert torch.equal(only.boxes.tensor, crowd.boxes.tensor[1:])
    assert len(CrowdRegions.cat([crowd, crowd])) == 4
    assert CrowdRegions.cat([crowd, crowd]).classes.tolist() == [5, 7]
    # Where nobody knows, they are of any class.
    unknown = CrowdRegions(crowd.boxes, None, 2)
    assert unknown.of_class(3) is unknown


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
@pytest.mark.parametrize("with_crowd", [False, True])
@pytest.mark.parametrize("crop", [False, True])
def test_image_without_objects(dataset_dict, mask_format, with_crowd, crop):
    crowd = dataset_dict["annotations"][1]
    dataset_dict["annotations"] = [crowd] if with_crowd else []
    masks = ("INPUT.USE_INSTANCE_MASK", True, "INPUT.MASK_FORMAT", mask_format)
    cropped = ("INPUT.CROP.ENABLED", crop, "INPUT.CROP.SIZE", (1.0, 1.0))
    instances = make_mapper(*masks, *cropped)(dataset_dict)["instances"]
    assert len(instances) == len(instances.gt_areas) == len(instances.gt_masks) == 0
    assert len(instances.crowd_regions) == 0
    assert instances.crowd_regions.boxes.tensor.shape == (int(with_crowd), 4)
    assert instances.crowd_regions.masks.tensor.shape == (int(with_crowd), 50, 100)


def test_crowd_regions_follow_instances():
    regions = CrowdRegions(Boxes(torch.ones(2, 4)), BitMasks(torch.ones(2, 3, 3)), 4)
    instances = Instances((3, 3), gt_classes=torch.arange(4), crowd_regions=regions)
    for index, length in [
        (torch.tensor([True, False, True, False]), 2),
        (torch.tensor([3, 3, 1]), 3),
        (torch.tensor([], dtype=torch.int64), 0),
        (slice(1, None), 3),
        (2, 1),
    ]:
        picked = instances[index]
        assert len(picked.crowd_regions) == length, index
        assert torch.equal(picked.crowd_regions.boxes.tensor, regions.boxes.tensor)
    joined = Instances.cat([instances[:1], instances[1:]])
    assert len(joined.crowd_regions) == 4
    assert len(joined.crowd_regions.boxes) == len(joined.crowd_regions.masks) == 2
    assert len(instances.to("cpu").crowd_regions) == 4


def test_roi_heads_do_not_copy_crowd(dataset_dict):
    instances = make_mapper()(dataset_dict)["instances"]
    heads = StandardROIHeads.__new__(StandardROIHeads)
    torch.nn.Module.__init__(heads)
    heads.proposal_append_gt, heads.num_classes = True, 80
    heads.batch_size_per_image, heads.positive_fraction = 8, 0.5
    heads.proposal_matcher = Matcher([0.5], [0, 1])
    proposals = Instances(
        instances.image_size,
        proposal_boxes=Boxes(torch.tensor([[5.0, 5, 15, 25]])),
        objectness_logits=torch.zeros(1),
    )
    with EventStorage():
        (sampled,) = heads.label_and_sample_proposals([proposals], [instances])
    assert "crowd_regions" not in sampled.get_fields()
    assert "gt_areas" in sampled.get_fields()


def test_inference_gives_no_instances(dataset_dict):
    out = make_mapper("INPUT.WARP_SIZE", "(64, 32)", is_train=False)(dataset_dict)
    assert out["image"].shape == (3, 50, 100)
    assert "instances" not in out and "annotations" not in out


def test_warp_ignores_the_aspect_ratio_and_keeps_flips(dataset_dict):
    mapper = make_mapper("INPUT.WARP_SIZE", "(50, 50)", "INPUT.RANDOM_FLIP", "horizontal")
    assert isinstance(mapper.augmentations.augs[1], T.RandomFlip)
    mapper.augmentations.augs[1].prob = 1.0
    out = mapper(dataset_dict)
    assert out["image"].shape == (3, 50, 50)
    torch.testing.assert_close(
        out["instances"].gt_boxes.tensor[0], torch.tensor([42.5, 5, 47.5, 25])
    )
    assert out["instances"].gt_areas.tolist() == [123.5, 400]


DY_TRAIN_SCALE = ("INPUT.DY_TRAIN_SCALE.ENABLED", True)


def test_training_scale_gives_an_object_the_drawn_side(dataset_dict):
    mapper = make_mapper(*DY_TRAIN_SCALE, "INPUT.RANDOM_FLIP", "horizontal")
    augmentations = mapper.augmentations
    np.random.seed(0)
    seen = set()
    for _ in range(40):
        out = mapper(dataset_dict)
        boxes = out["instances"].gt_boxes.tensor
        sides = torch.minimum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1])
        # Shorter sides are 20 and 10 pixels; 10 would need scales of 7.2 to 12.8, where the image's
        # longer side of 200 is bounded to 1000 pixels, scale 5.
        on_range = [bool(72 <= side.round() <= 128) for side in sides]
        bounded = max(out["image"].shape[1:]) == 1000
        assert on_range[0] or bounded
        seen.add((on_range[0], bounded))
        assert out["instances"].gt_areas.tolist() == [123.5, 400]
    assert len(seen) > 1
    assert mapper.augmentations is augmentations, "a mapper serves several images at once"


def test_keys_of_the_training_scale_reach_the_resize(dataset_dict):
    node = "INPUT.DY_TRAIN_SCALE"
    mapper = make_mapper(
        *DY_TRAIN_SCALE, f"{node}.RULE", "area", f"{node}.AREA_SIDES", "(10, 20)",
        f"{node}.AREA_TOLERANCE", 0.25, f"{node}.MIN_IMAGE_SIDE", 3,
    )  # fmt: skip
    resize = mapper.training_resize(dataset_dict)
    held = (resize.rule, resize.area_sides, resize.area_tolerance, resize.min_image_side)
    assert held == ("area", (10, 20), 0.25, 3)
    assert make_mapper(*DY_TRAIN_SCALE).training_resize(dataset_dict).rule == "shorter_side"


def test_training_scale_falls_back_to_the_usual_resize(dataset_dict):
    dataset_dict["annotations"] = [
        annotation((10, 10, 10, 50)),
        annotation((300, 10, 340, 50)),
        dataset_dict["annotations"][1],  # crowd
    ]
    assert make_mapper(*DY_TRAIN_SCALE)(dataset_dict)["image"].shape == (3, 50, 100)
    dataset_dict["annotations"] = []
    assert make_mapper(*DY_TRAIN_SCALE)(dataset_dict)["image"].shape == (3, 50, 100)


def test_training_scale_is_for_training_only(dataset_dict):
    mapper = make_mapper(*DY_TRAIN_SCALE, is_train=False)
    assert mapper(dataset_dict)["image"].shape == (3, 50, 100)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (("INPUT.WARP_SIZE", "(513,)"), "INPUT.WARP_SIZE"),
        (("INPUT.WARP_SIZE", "(513, 0)"), "INPUT.WARP_SIZE"),
        (("INPUT.WARP_SIZE", "(513, 51.5)"), "INPUT.WARP_SIZE"),
        ((*DY_TRAIN_SCALE, "INPUT.WARP_SIZE", "(513, 513)"), "INPUT.WARP_SIZE"),
        ((*DY_TRAIN_SCALE, "INPUT.CROP.ENABLED", True), "INPUT.CROP.ENABLED"),
        ((*DY_TRAIN_SCALE, "INPUT.DY_TRAIN_SCALE.OBJECT_SIDE", "(128, 72)"), "OBJECT_SIDE"),
        ((*DY_TRAIN_SCALE, "INPUT.DY_TRAIN_SCALE.OBJECT_SIDE", "(0, 72)"), "OBJECT_SIDE"),
        ((*DY_TRAIN_SCALE, "INPUT.DY_TRAIN_SCALE.RULE", "width"), "DY_TRAIN_SCALE.RULE"),
        ((*DY_TRAIN_SCALE, "INPUT.DY_TRAIN_SCALE.AREA_SIDES", "(0, 64)"), "AREA_SIDES"),
        ((*DY_TRAIN_SCALE, "INPUT.DY_TRAIN_SCALE.AREA_TOLERANCE", 1.0), "AREA_TOLERANCE"),
        ((*DY_TRAIN_SCALE, "INPUT.DY_TRAIN_SCALE.GROUPED_BATCHES", 0), "GROUPED_BATCHES"),
        ((*DY_TRAIN_SCALE, "INPUT.DY_TRAIN_SCALE.MIN_IMAGE_SIDE", 2000), "MIN_IMAGE_SIDE"),
    ],
)
def test_bad_configuration_names_the_key(overrides, key):
    with pytest.raises(ValueError, match=key):
        make_mapper(*overrides)


def test_missing_masks_name_the_image_and_the_key(dataset_dict):
    del dataset_dict["annotations"][2]["segmentation"]
    make_mapper()(dataset_dict)
    with pytest.raises(ValueError, match=r"image\.png has no mask.*INPUT\.USE_INSTANCE_MASK"):
        make_mapper("INPUT.USE_INSTANCE_MASK", True)(dataset_dict)


def test_encoded_masks_need_the_bitmask_format(dataset_dict):
    encoded = dataset_dict["annotations"][1]["segmentation"]
    dataset_dict["annotations"][0]["segmentation"] = encoded
    with pytest.raises(ValueError, match=r"INPUT\.MASK_FORMAT to 'bitmask'"):
        make_mapper("INPUT.USE_INSTANCE_MASK", True)(dataset_dict)
    mapper = make_mapper("INPUT.USE_INSTANCE_MASK", True, "INPUT.MASK_FORMAT", "bitmask")
    assert mapper(dataset_dict)["instances"].gt_masks.tensor.shape == (2, 50, 100)


@pytest.mark.parametrize("is_train", [True, False])
def test_missing_image_is_named(dataset_dict, is_train, tmp_path):
    dataset_dict["file_name"] = str(tmp_path / "gone.jpg")
    with pytest.raises(FileNotFoundError, match=r"gone\.jpg is missing.*DETECTRON2_DATASETS"):
        make_mapper(is_train=is_train)(dataset_dict)


@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_corrupt_image_is_named(dataset_dict, tmp_path, damage, suffix):
    file = tmp_path / f"bad.{suffix}"
    noise = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file)
    content = {"cut": file.read_bytes()[:5000], "text": b"not an image", "empty": b""}
    file.write_bytes(content[damage])
    dataset_dict["file_name"] = str(file)
    with pytest.raises(ValueError, match=rf"bad\.{suffix} cannot be read"):
        make_mapper()(dataset_dict)


def test_size_mismatch_names_the_image(dataset_dict):
    dataset_dict["height"] = HEIGHT + 1
    with pytest.raises(ValueError, match=r"image\.png.*width/height in your annotation"):
        make_mapper()(dataset_dict)
