"""The commands of DeepMask: a picture of masks, filled boxes, branches of two models."""

import runpy

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image
from pycocotools import mask as mask_util

from d2proposals.deepmask.trunk_maps import TrunkMaps
from d2proposals.files.conversion import read_proposals, write_proposals
from d2proposals.files.proposal_set import ProposalSet
from tests.common import CONFIGS, ROOT, make_cfg, run_tool
from tests.deepmask.deepmask_networks import build_network
from tests.engine.tiny_coco import CONFIG as RPN_CONFIG
from tests.engine.tiny_coco import SMALL as TINY

CONFIG = str(CONFIGS / "shapes" / "deepmask_rpn_only.yaml")
SMALL = ("MODEL.DEVICE", "cpu", "MODEL.DEEPMASK.LOG2_SCALES", "(-0.5, 0.5)")


@pytest.mark.parametrize("options", [[], ["--best", 3], ["--iou", 0]])
def test_a_picture_of_masks(options, tiny_coco, tmp_path, capsys):
    output = tmp_path / "masks.png"
    run_tool("visualize_masks", "--config-file", CONFIG, "--dataset", "tiny_val", *options,
             "--num-images", 2, "--output", output, *SMALL)  # fmt: skip
    assert "2 images of tiny_val" in capsys.readouterr().out
    pixels = np.asarray(Image.open(output).convert("RGB"))
    assert pixels.std() > 10


def test_a_picture_of_a_model_without_masks(tiny_coco, tmp_path):
    with pytest.raises(SystemExit, match="without masks"):
        run_tool("visualize_masks", "--config-file", RPN_CONFIG, "--dataset", "tiny_val",
                 "--output", tmp_path / "x.png", *TINY)  # fmt: skip
    assert not (tmp_path / "x.png").exists()


def test_filled_boxes(tmp_path):
    bitmap = np.zeros((20, 30, 2), dtype=np.uint8, order="F")
    bitmap[5:9, 10:20, 0] = bitmap[2, 3, 1] = 1
    proposals = ProposalSet(
        "d2proposals", [7, 8],
        [np.array([[10, 5, 20, 12], [-2, 1.4, 4.6, 40]], np.float32), np.zeros((0, 4), np.float32)],
        [np.array([2.0, 1.0]), np.zeros(0)], [mask_util.encode(bitmap), []], scores_are_logits=True,
    )  # fmt: skip
    write_proposals(tmp_path / "in.json", proposals, "d2proposals")
    run_tool("fill_boxes", tmp_path / "in.json", tmp_path / "out.json")
    filled = read_proposals(tmp_path / "out.json")
    masks = mask_util.decode(filled.masks[0])
    expected = np.zeros_like(bitmap)
    expected[5:12, 10:20, 0] = expected[1:20, 0:5, 1] = 1
    assert np.array_equal(masks, expected) and filled.masks[1] == []
    assert np.array_equal(filled.boxes[0], proposals.boxes[0])
    assert filled.image_ids == [7, 8]


def save(model, path):
    torch.save({"model": model.state_dict()}, path)
    return path


@torch.no_grad()
def test_masks_of_one_model_and_scores_of_another(tmp_path):
    scales = ["MODEL.DEEPMASK.LOG2_SCALES", (0.0,)]
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(build_model(make_cfg("shapes/deepmask_rpn_only.yaml", *scales)).eval())
    paths = [save(model, tmp_path / f"{k}.pth") for k, model in enumerate(models)]
    output = tmp_path / "combined.pth"
    run_tool("combine_branches", "--masks", paths[0], "--scores", paths[1], output)
    combined = build_model(
        make_cfg("shapes/deepmask_rpn_only.yaml", *scales, "MODEL.DEEPMASK.SHARED_TRUNK", False)
    ).eval()
    combined.load_state_dict(torch.load(output, weights_only=True)["model"])
    patches = torch.randn(3, 3, 112, 112)
    networks = [x.proposal_generator.network for x in (*models, combined)]
    assert torch.equal(networks[2].mask_logits(patches), networks[0].mask_logits(patches))
    assert torch.equal(networks[2].score_logits(patches), networks[1].score_logits(patches))
    # In inference, too; and a combined model gives its scores away again.
    image = [{"image": torch.rand(3, 70, 90) * 255}]
    scored, both = (x(image)[0]["proposals"].objectness_logits for x in (models[1], combined))
    assert torch.allclose(scored[:5], both[:5], atol=1e-5)
    run_tool("combine_branches", "--masks", paths[1], "--scores", output, tmp_path / "again.pth")
    again = torch.load(tmp_path / "again.pth", weights_only=True)["model"]
    expected = models[1].state_dict()
    name = "proposal_generator.network.trunk.features.0.weight"
    assert torch.equal(again[name], expected[name])
    assert torch.equal(again[name.replace("trunk", "score_trunk")], expected[name])


def test_branches_of_no_deepmask(tmp_path):
    torch.save({"model": {"x": torch.zeros(1)}}, tmp_path / "x.pth")
    (tmp_path / "y.pth").write_text("nothing")
    for masks, message in (("x", "no weights"), ("y", "cut off"), ("z", "no checkpoint")):
        with pytest.raises(SystemExit, match=message):
            run_tool("combine_branches", "--masks", tmp_path / f"{masks}.pth", "--scores",
                     tmp_path / "x.pth", tmp_path / "out.pth")  # fmt: skip
    assert not (tmp_path / "out.pth").exists()


def test_the_benchmark(capsys):
    run_tool("benchmark_deepmask", "--config-file", CONFIG, "--image-size", 50, 70,
             "--num-patches", 2, "--windows", 3, *SMALL)  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("9 windows: dense")
    assert [x.split()[0] for x in lines[3:]] == ["trunk", "mask", "score", "together"]


def test_the_benchmark_counts_the_work():
    namespace = runpy.run_path(str(ROOT / "tools" / "benchmark_deepmask.py"))
    network = build_network(patch_size=64)
    meter = namespace["Meter"](network)
    trunk = TrunkMaps(network.trunk)
    with torch.no_grad(), meter:
        trunk._map_in_tiles(torch.zeros(3, 64, 96), 6)
        pixels = 64 * 96
        expected = 9 * pixels * (3 * 4 + 4 * 8 / 4 + 2 * 8 * 8 / 16 + (8 + 12) * 12 / 64)
        expected += 9 * pixels * 2 * 12 * 12 / 256
        assert meter.work["trunk"] == expected
        network.score_head.at_every_window(torch.zeros(1, 12, 5, 6))
        assert meter.work["score layers"] == 2 * 3 * (12 * 4 * 7 + 7 * 9 + 9)
        network.mask_head.at_windows(
            torch.zeros(6, 5, 6), torch.tensor([0, 1, 1]), torch.zeros(3).long()
        )
        assert meter.work["mask layers"] == 3 * (6 * 16 * 5 + 5 * 256)
        trunk._map_in_tiles(torch.zeros(3, 64, 96), 6)
        assert meter.work["trunk"] == 2 * expected
    # Outside, nothing is measured.
    trunk._map_in_tiles(torch.zeros(3, 64, 96), 6)
    assert meter.work["trunk"] == 2 * expected
