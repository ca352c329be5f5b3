"""The sliding-window baseline (Sec. 7): its windows, and the detector in its full form."""

import pytest
import torch
from detectron2.modeling import build_model, build_proposal_generator
from detectron2.structures import Boxes, ImageList, pairwise_iou
from detectron2.utils.events import EventStorage

from d2proposals.detectornet.sliding_windows import SlidingGrid
from d2proposals.files.conversion import read_proposals
from tests.common import make_cfg, make_images, make_instances, run_tool
from tests.engine.tiny_coco import registered, write_tiny_coco

CONFIG = "detectornet_sliding_windows_voc.yaml"
TINY = ["MODEL.DETECTORNET.WIDTH_FACTOR", 0.01]


def paper_grid():
    return SlidingGrid.from_config(make_cfg(CONFIG))


def twin(image_size, grid):
    """The windows one by one: all sizes and ratios, cut to the image, five pixels apart."""
    height, width = image_size
    windows = set()
    for size in grid.mean_dimensions:
        both = size * (height + width)
        for ratio in grid.aspect_ratios:
            h = min(max(both / (1 + ratio), both - width), height)
            w = min(both - h, width)
            y = 0
            while y + h <= height + 1e-4:
                x = 0
                while x + w <= width + 1e-4:
                    windows.add((round(x, 2), round(y, 2), round(x + w, 2), round(y + h, 2)))
                    x += grid.stride
                y += grid.stride
    return windows


def test_about_150_000_windows_of_an_image():
    grid = paper_grid()
    assert grid.number((375, 500)) == 156_370 and grid.number((500, 375)) == 159_441


@pytest.mark.parametrize("image_size", [(60, 80), (83, 51), (7, 90), (1, 1)])
def test_all_windows_equal_a_twin(image_size):
    grid = paper_grid()
    windows = grid.windows(image_size)
    rows = {tuple(round(x, 2) for x in row) for row in windows.tolist()}
    assert len(rows - twin(image_size, grid)) <= 0.02 * len(rows)  # roundings in the last digit
    assert len(windows) == grid.number(image_size) and windows.dtype == torch.float32
    height, width = image_size
    assert windows[0].tolist() == [0, 0, width, height]  # "the largest covers the whole image"
    assert (windows >= 0).all() and (windows <= torch.tensor([width, height] * 2) + 1e-3).all()
    sides = (windows[:, 2:] - windows[:, :2]).sum(dim=1) / (height + width)
    assert (sides.diff() <= 1e-5).all() and sides[-1].item() == pytest.approx(0.1)
    assert len(windows.unique(dim=0)) == len(windows)


def test_the_generator_proposes_them_all_and_none_in_training():
    generator = build_proposal_generator(make_cfg(CONFIG), {}).eval()
    images = make_images((60, 80), (40, 44))
    proposals, losses = generator(images, {})
    assert losses == {} and [len(x) for x in proposals] == [
        paper_grid().number((60, 80)), paper_grid().number((40, 44)),
    ]  # fmt: skip
    assert (proposals[0].objectness_logits.diff() < 0).all()
    proposals, losses = generator.train()(images, {}, [])
    assert losses == {} and [len(x) for x in proposals] == [0, 0]


class Bright(torch.nn.Module):
    """A classifier: class 7 where a crop is bright all over, background elsewhere."""

    input_size = 16

    def __init__(self):
        super().__init__()
        self.largest = 0

    def forward(self, crops):
        self.largest = max(self.largest, len(crops))
        is_bright = crops.amin(dim=(1, 2, 3)) > 0.95
        logits = torch.zeros(len(crops), 21)
        logits[:, 20] = 4.0
        logits[is_bright, 7] = 8.0
        return logits


def test_the_full_form_on_a_small_image():
    # All sizes, ratios and positions, a stride of five pixels, NMS .5, on one image.
    torch.manual_seed(0)
    cfg = make_cfg(CONFIG, *TINY, "TEST.DETECTIONS_PER_IMAGE", 5000)
    assert cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST == 0.5
    model = build_model(cfg).eval()
    model.roi_heads.classifier = Bright()
    model.roi_heads.normalization = torch.nn.Identity()
    pixels = torch.zeros(3, 60, 80)
    pixels[:, 20:50, 30:70] = 1.0
    images = ImageList(pixels[None], [(60, 80)])
    proposals, _ = model.proposal_generator(images, {})
    (found,), _ = model.roi_heads(images, {}, proposals)
    assert len(proposals[0]) == paper_grid().number((60, 80)) > 2000
    assert model.roi_heads.classifier.largest == 64  # at once, which bounds the memory
    assert len(found) > 1 and set(found.pred_classes.tolist()) == {7}
    boxes = found.pred_boxes.tensor
    assert (boxes[:, :2] >= torch.tensor([29.0, 19])).all()
    assert (boxes[:, 2:] <= torch.tensor([71.0, 51])).all()
    assert (pairwise_iou(found.pred_boxes, found.pred_boxes).fill_diagonal_(0) <= 0.5).all()
    # Every window that is bright all over is a detection, or suppressed by one. (At the edge of
    # the bright part, pixels of a crop are means of both sides.)
    windows = proposals[0].proposal_boxes
    inside = (windows.tensor[:, :2] >= torch.tensor([31.0, 21])).all(dim=1)
    inside &= (windows.tensor[:, 2:] <= torch.tensor([69.0, 49])).all(dim=1)
    assert inside.sum() > 50
    assert (pairwise_iou(windows[inside], found.pred_boxes).amax(dim=1) > 0.5).all()


def test_the_baseline_trains_its_classifier():
    torch.manual_seed(0)
    model = build_model(make_cfg(CONFIG, *TINY)).train()
    batch = {
        "image": torch.randint(0, 256, (3, 60, 80)).float(),
        "instances": make_instances((60, 80), [[10, 10, 60, 50]]),
    }
    with EventStorage():
        losses = model([batch])
    assert set(losses) == {"loss_detectornet_classifier"}
    losses["loss_detectornet_classifier"].backward()
    assert all(p.grad is not None for p in model.parameters())


def test_windows_in_a_file(tmp_path, capsys):
    output = tmp_path / "sliding.pkl"
    with registered(write_tiny_coco(tmp_path / "datasets") / "coco"):
        run_tool("write_windows", output, "--dataset", "tiny_val", "--sliding", "--stride", "20")
    proposals = read_proposals(output)
    cfg = make_cfg(CONFIG, "MODEL.DETECTORNET.SLIDING_WINDOWS.STRIDE", 20.0)
    expected = SlidingGrid.from_config(cfg).windows((64, 80))
    assert len(proposals.boxes) == 4
    for boxes in proposals.boxes:
        assert torch.equal(torch.as_tensor(boxes).float(), expected)
    with pytest.raises(SystemExit):
        run_tool("write_windows", output, "--dataset", "tiny_val", "--stride", "0")
    assert "--stride must be a positive number" in capsys.readouterr().err


@pytest.mark.parametrize(
    "key, value",
    [("MEAN_DIMENSIONS", (0.5, 1.5)), ("MEAN_DIMENSIONS", ()), ("ASPECT_RATIOS", (0.0,)),
     ("STRIDE", 0.0), ("STRIDE", float("nan"))],
)  # fmt: skip
def test_settings_that_make_no_sense(key, value):
    cfg = make_cfg(CONFIG, f"MODEL.DETECTORNET.SLIDING_WINDOWS.{key}", value)
    with pytest.raises(ValueError, match=f"MODEL.DETECTORNET.SLIDING_WINDOWS.{key} needs"):
        build_proposal_generator(cfg, {})


def test_perfect_windows_are_boxes():
    # A window of the grid is there to the pixel.
    windows = Boxes(paper_grid().windows((100, 150)))
    assert pairwise_iou(windows[1234:1235], windows).max() == 1
