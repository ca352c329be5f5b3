"""The authors' released DeepMask: its Torch7 file, converted, against its layers run one by one."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from detectron2.structures import ImageList
from detectron2.utils.events import EventStorage

from d2proposals.deepmask import MaskHead
from d2proposals.deepmask.dense_inference import predict_windows
from d2proposals.deepmask.image_canvas import CanvasStyle, ImageCanvas, resample_bilinear
from d2proposals.deepmask.network import build_network
from d2proposals.deepmask.released_weights import read_released_weights
from d2proposals.engine import ProposalCheckpointer
from tests.common import add_rectangle_masks, make_cfg, make_instances, run_tool
from tests.deepmask.released_model import ReleasedModel, resample
from tests.torch7_writer import Object, torch7_bytes


@pytest.fixture(scope="module")
def released():
    return ReleasedModel()


@pytest.fixture(scope="module")
def converted(released, tmp_path_factory):
    """The configuration's model with the weights of the file."""
    folder = tmp_path_factory.mktemp("released")
    (folder / "model.t7").write_bytes(torch7_bytes(released.table()))
    run_tool("convert_weights", "--architecture", "deepmask_r50", folder / "model.t7",
             folder / "released.pkl")  # fmt: skip
    model = build_model(make_cfg("deepmask_r50_rpn_only.yaml")).eval()
    incompatible = []
    checkpointer = ProposalCheckpointer(model)
    checkpointer._log_incompatible_keys = incompatible.append
    checkpointer.load(str(folder / "released.pkl"))
    assert not incompatible[0].missing_keys and not incompatible[0].unexpected_keys
    assert not incompatible[0].incorrect_shapes
    return model


@torch.no_grad()
def test_patches_have_the_masks_and_scores_of_the_released_layers(released, converted):
    network = converted.proposal_generator.network
    patches = torch.randn(2, 3, 192, 192, generator=torch.Generator().manual_seed(0))
    masks, scores = network.mask_and_score_logits(patches, 2)
    masks = network.mask_head.in_window(masks, network.mask_head.target_size)
    expected_masks, expected_scores = released.patch(patches)
    assert masks.shape == (2, 112, 112) and masks.std() > 0.1 and scores.std() > 1e-3
    torch.testing.assert_close(masks, expected_masks, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(scores, expected_scores, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size, scale", [((61, 90), 0.5), ((48, 33), 2**0.5)])
@torch.no_grad()
def test_windows_have_the_masks_and_scores_of_the_released_layers(released, converted, size, scale):
    generator = converted.proposal_generator
    network = generator.network
    image = torch.rand(3, *size, generator=torch.Generator().manual_seed(1))
    model_pixels = (image * 255 - converted.pixel_mean) / converted.pixel_std
    windows = predict_windows(network, generator.pixel_normalization, model_pixels, [scale], 10**6)
    masks, scores = released.dense(image, scale)
    # 61 * .5 = 30.5 and so on: halves are rounded up; one window more than whole strides.
    sides = [int(side * scale + 0.5) for side in size]
    assert scores.shape == tuple(-(-side // 16) + 1 for side in sides)
    scores, order = scores.flatten().sort(descending=True)
    torch.testing.assert_close(windows.score_logits, scores, atol=1e-4, rtol=1e-4)
    masks = masks.flatten(1).T[order].view(-1, 56, 56)
    torch.testing.assert_close(windows.mask_logits, masks, atol=1e-4, rtol=1e-4)
    # The middle of window (row, column) is pixel (16 row, 16 column) of the scaled image.
    centers = (windows.frames[:, :2] + windows.frames[:, 2:]) / 2 * torch.tensor(sides[::-1])
    row, column = order // (-(-sides[1] // 16) + 1), order % (-(-sides[1] // 16) + 1)
    expected = torch.stack([column, row], dim=1) * 16.0
    torch.testing.assert_close(centers, expected, atol=1e-3, rtol=0)


def test_the_pyramid_and_the_border_of_one_image_by_hand():
    # (1, 3) -> (2, 5): samples at 0, .5, 1, 1.5, 2 between the pixels' middles, one row only.
    image = torch.tensor([[[0.0, 4.0, 8.0]]])
    expected = torch.tensor([[[0.0, 2, 4, 6, 8]] * 2])
    torch.testing.assert_close(resample_bilinear(image, (2, 5)), expected)
    # (3, 4) -> (2, 2): corners, without averages of what is in between.
    image = torch.arange(12.0).view(1, 3, 4)
    torch.testing.assert_close(
        resample_bilinear(image, (2, 2)), torch.tensor([[[0.0, 3], [8, 11]]])
    )
    # 5 * .5 = 2.5 becomes 3, 3 * .5 = 1.5 becomes 2; half a patch of border whatever the size.
    image = torch.arange(15.0).view(1, 5, 3).repeat(3, 1, 1)
    canvas = ImageCanvas(
        image, 0.5, patch_size=4, context=16, stride=2,
        style=CanvasStyle("half_patch", (1.0, 2.0, 3.0), "bilinear_corners"),
        border_pixel=torch.tensor([-1.0, -2, -3]).view(3, 1, 1), normalize=lambda x: 10 * x,
    )  # fmt: skip
    assert (canvas.image_size, canvas.size, canvas.before) == ((3, 2), (7, 6), 2)
    assert (canvas.map_size, canvas.map_border) == ([4, 3], 0)
    whole = canvas.rows(0, 7)
    expected = torch.full((3, 7, 6), 10.0) * torch.tensor([-1.0, -2, -3]).view(3, 1, 1)
    expected[:, 2:5, 2:4] = torch.tensor([[0.0, 2], [6, 8], [12, 14]]) * 10
    torch.testing.assert_close(whole, expected)
    torch.testing.assert_close(canvas.rows(3, 6), expected[:, 3:6])
    torch.testing.assert_close(canvas.border_pixel(), torch.tensor([-10.0, -20, -30]))


@pytest.mark.parametrize("size", [(7, 9), (1, 1), (3, 1)])
@pytest.mark.parametrize("sides", [(4, 5), (1, 1), (12, 30), (7, 9)])
def test_resampling_in_rows_is_torch_s_and_that_of_the_released_layer(size, sides):
    image = torch.randn(2, *size)
    whole = resample_bilinear(image, sides)
    torch.testing.assert_close(whole, resample(image[None], sides)[0])
    expected = F.interpolate(image[None], size=sides, mode="bilinear", align_corners=True)[0]
    torch.testing.assert_close(whole, expected, atol=1e-5, rtol=1e-5)
    for first in range(sides[0]):
        rows = resample_bilinear(image, sides, (first, sides[0]))
        torch.testing.assert_close(rows, whole[:, first:])


def test_masks_with_logits_at_the_corners_cover_a_little_more_than_their_window():
    head = MaskHead(in_channels=3, map_size=1, patch_size=7, channels=None, code_dim=0,
                    mask_size=3, upsampling="bilinear_corners", target_size=5)  # fmt: skip
    logits = torch.tensor([[[0.0, 4, 8]] * 3])
    torch.testing.assert_close(head.in_window(logits, 5)[0, 0], torch.tensor([0.0, 2, 4, 6, 8]))
    # Logits 3 pixels apart, in the middles of cells: 3 cells cover 9 pixels of the 7.
    assert head.frame_scale == 9 / 7
    cover = head.enlarge(logits)[0, 0]  # at 7 points of these 9 pixels
    pixel = (torch.arange(7) + 0.5) * 9 / 7 - 1 - 0.5  # 0 is the window's first pixel
    torch.testing.assert_close(cover, (pixel * 8 / 6).clamp(0, 8))
    assert head.target_size == 5


def test_patches_beyond_the_image_have_the_border_s_colour(converted):
    generator = converted.proposal_generator
    images = ImageList.from_tensors([torch.zeros(3, 40, 50), torch.ones(3, 64, 64)], 32)
    gt = [make_instances((40, 50), [[30, 20, 50, 40]]), make_instances((64, 64))]
    ground_truth = generator.sampler.read_ground_truth(gt)
    samples = generator.sampler.sample(ground_truth, 1, 0)
    samples.centers[:] = torch.tensor([50.0, 20.0])  # at the right edge of the first image
    samples.object_sizes[:] = 92.0  # one pixel for one
    samples.flipped[:] = False
    patch = generator._cut_patches(images, samples)[0]
    grey = (127.5 - converted.pixel_mean) / converted.pixel_std
    assert patch.shape == (3, 192, 192)
    # The image's 40 rows begin at row 96 - 20, its 50 columns end in the middle.
    torch.testing.assert_close(patch[:, 76:116, 46:96], torch.zeros(3, 40, 50))
    outside = torch.ones(192, 192, dtype=torch.bool)
    outside[76:116, 46:96] = False
    expected = grey.view(3, 1).expand(3, int(outside.sum()))
    torch.testing.assert_close(patch[:, outside], expected, atol=1e-6, rtol=0)


def test_a_training_step_and_its_proposals(converted):
    model = converted
    image = torch.randint(0, 256, (3, 64, 96)).float()
    instances = add_rectangle_masks(make_instances((64, 96), [[8, 8, 80, 56]]))
    model.train()
    names = {}
    for iteration in (0, 1):
        model.zero_grad(set_to_none=True)
        with EventStorage(iteration):
            losses = model([{"image": image, "instances": instances}])
        sum(losses.values()).backward()
        assert all(x.isfinite() for x in losses.values())
        names[iteration] = {k for k, x in losses.items() if x.detach() != 0}
        parameters = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        assert [n for n, p in parameters if p.grad is None] == []
    # One branch after the other, both through the shared code.
    assert names == {0: {"loss_deepmask_mask"}, 1: {"loss_deepmask_score"}}
    model.zero_grad(set_to_none=True)
    model.eval()
    with torch.no_grad():
        (output,) = model([{"image": image, "height": 64, "width": 96}])
    proposals = output["proposals"]
    assert len(proposals) > 0 and proposals.has("proposal_masks")
    logits = proposals.objectness_logits
    assert (logits[1:] <= logits[:-1]).all()


@pytest.mark.parametrize(
    "path, fields, message",
    [
        ([0, 0], {"pad_l": 2}, "layer 1 is symmetric padding 2 3 3 3, expected symm"),
        ([0, 1], {"dW": 1}, "layer 2 is convolution 3 64 7 1 0, expected convolution 3 64 7 2 0"),
        ([0, 1], {"padW": 3}, "layer 2 is convolution 3 64 7 2 3"),
        ([0, 1], {"kW": "x"}, "sizes that are no numbers"),
        ([0, 1], {"weight": None}, "the weight of a layer .* has 0 numbers, expected 9408"),
        ([1], {"b": None}, "the b of a layer .* has 0 numbers, expected 64"),
        ([3], {"kW": 2}, "layer 5 is max pooling 2 2 1, expected max pooling 3 2 1"),
        ([4], {"modules": []}, "layer 6 is symmetric padding|layer 6 is convolution 256"),
        ([4], {"modules": [1.0]}, "something in it is no layer but float"),
        ([4], {"modules": {"x": Object("nn.Identity")}}, "no layer but NoneType"),
        ([7], {"pad_b": 0}, "zero padding -1 -1 -1 0, expected zero padding -1 -1 -1 -1"),
        ([11], {"weight": None}, "layer .* is linear, expected linear 512 12800"),
    ],
)  # fmt: skip
def test_another_network_is_named(released, path, fields, message, tmp_path, monkeypatch):
    layer = released.trunk
    for index in path:
        layer = layer.fields["modules"][index]
    monkeypatch.setattr(layer, "fields", layer.fields | fields)
    refuse(released.table(), f"model.t7: trunk branch: .*{message}", tmp_path)


def refuse(content, message, folder):
    (folder / "model.t7").write_bytes(torch7_bytes(content))
    with pytest.raises(ValueError, match=message) as error:
        read_released_weights(folder / "model.t7")
    assert "\n" not in str(error.value)


def test_files_without_a_deepmask(tmp_path):
    circle = Object("nn.Sequential")
    circle.fields["modules"] = [circle, circle]
    endless = {"model": Object("nn.DeepMask", trunk=circle)}
    refuse(endless, "trunk branch: it has more than 2000 layers", tmp_path)
    refuse({"model": Object("nn.DeepMask")}, "no layer but NoneType", tmp_path)
    for content in ({}, [1.0], Object("nn.Sequential"), {"model": Object("nn.Linear")}, "text"):
        refuse(content, "holds no DeepMask", tmp_path)
    refuse(Object("nn.LSTM"), "'nn.LSTM', which is not known", tmp_path)


def test_convolutions_with_biases_and_the_later_class_of_their_normalisation(tmp_path):
    released = ReleasedModel(seed=1, conv_biases=True, affine_class="inn.ConstAffine")
    model = released.table()["model"]
    model.class_name = "nn.SharpMask"  # which holds a DeepMask under another name
    model.fields["maskBranchDM"] = model.fields.pop("maskBranch")
    (tmp_path / "model.t7").write_bytes(torch7_bytes({"model": model}))
    weights = read_released_weights(tmp_path / "model.t7")
    network = build_network(make_cfg("deepmask_r50_rpn_only.yaml")).eval()
    network.load_state_dict(
        {k.removeprefix("proposal_generator.network."): v for k, v in weights.items()}, strict=False
    )
    patches = torch.randn(1, 3, 192, 192, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        masks, scores = network.mask_and_score_logits(patches, 1)
    expected_masks, expected_scores = released.patch(patches)
    torch.testing.assert_close(
        network.mask_head.in_window(masks, 112), expected_masks, atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(scores, expected_scores, atol=1e-4, rtol=1e-4)
