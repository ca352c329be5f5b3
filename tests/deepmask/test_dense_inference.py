"""Dense inference against patches one by one; its canvas, tiles and bands."""

import math

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.structures import ImageList
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from d2proposals.backbones import VGG
from d2proposals.deepmask import dense_inference, image_canvas, trunk_maps
from d2proposals.deepmask.dense_inference import predict_windows
from d2proposals.deepmask.image_canvas import ImageCanvas, scale_image
from d2proposals.deepmask.network import build_network as build_from_config
from d2proposals.deepmask.patch_sampling import PatchSampler
from d2proposals.deepmask.trunk_maps import TrunkMaps
from d2proposals.proposals.image_pyramid import resize_image, scaled_size
from d2proposals.proposals.patches import crop_patches
from tests.common import make_cfg, make_instances
from tests.deepmask.deepmask_networks import build_network


def patch_by_patch(network, scaled, context):
    """Mask and score logits of every window, each cut out of the scaled image with its context."""
    half, stride = network.patch_size // 2 + context, network.stride
    canvas = F.pad(scaled, (half,) * 4)
    windows = [
        canvas[None, :, y : y + 2 * half, x : x + 2 * half]
        for y in range(0, scaled.shape[1] + 1, stride)
        for x in range(0, scaled.shape[2] + 1, stride)
    ]
    # Windows at the far edge may lack a few zeros.
    windows = [F.pad(w, (0, 2 * half - w.shape[-1], 0, 2 * half - w.shape[-2])) for w in windows]
    network.context = context
    patches = torch.cat(windows)
    return network.mask_logits(patches), network.score_logits(patches)


def dense(network, scaled, context):
    """The same from one pass, in the order of the windows."""
    network.context = context
    windows = predict_windows(network, nn.Identity(), scaled, [1.0], 10**6)
    height, width = scaled.shape[1:]
    center = (windows.frames[:, :2] + windows.frames[:, 2:]) / 2 * torch.tensor([width, height])
    column, row = (center / network.stride).round().long().unbind(dim=1)
    order = (row * (width // network.stride + 1) + column).argsort()
    return windows.mask_logits[order], windows.score_logits[order]


@pytest.mark.parametrize("shared", [True, False])
@torch.no_grad()
def test_dense_inference_equals_patches_one_by_one_at_three_scales(shared):
    network = build_network(patch_size=96, shared=shared)
    image = torch.randn(3, 120, 150)
    for scale in (2**-0.5, 1.0, 2**0.5):
        scaled = resize_image(image, scaled_size((120, 150), scale))
        masks, scores = patch_by_patch(network, scaled, 64)
        dense_masks, dense_scores = dense(network, scaled, 64)
        assert len(scores) == (scaled.shape[1] // 16 + 1) * (scaled.shape[2] // 16 + 1)
        assert scores.std() > 1e-2 and masks.std(dim=0).mean() > 1e-2
        torch.testing.assert_close(dense_masks, masks, atol=1e-4, rtol=0)
        torch.testing.assert_close(dense_scores, scores, atol=1e-4, rtol=0)


@pytest.mark.parametrize("scale", [0.25, 0.5, 1.0])
@torch.no_grad()
def test_windows_of_the_pyramid_show_what_training_patches_show(scale):
    # Noise, whose deviation tells filters apart, and windows at the border as well.
    torch.manual_seed(0)
    network = build_network(patch_size=64, context=64)
    sampler = PatchSampler(patch_size=64, object_size=36, jitter_shift=4)
    image = torch.randn(3, 256, 192)
    windows = predict_windows(network, nn.Identity(), image, [scale], 10**6)
    frames = windows.frames * torch.tensor([192.0, 256, 192, 256])
    _, samples = sample_nothing(sampler, len(frames))
    samples.centers = (frames[:, :2] + frames[:, 2:]) / 2
    samples.object_sizes = torch.full_like(samples.object_sizes, 36 / scale)
    torch.testing.assert_close(sampler.boxes(samples), frames)
    boxes = sampler.boxes(samples, network.context)
    patches = crop_patches(
        ImageList.from_tensors([image]), boxes.round(), samples.image_index, (192, 192)
    )
    assert patches[:, :, 64:-64, 64:-64].std() > 0.1 * scale
    scores, masks = network.score_logits(patches), network.mask_logits(patches)
    torch.testing.assert_close(windows.score_logits, scores, atol=1e-4, rtol=0)
    torch.testing.assert_close(windows.mask_logits, masks, atol=1e-4, rtol=0)


def sample_nothing(sampler, number):
    ground_truth = sampler.read_ground_truth([make_instances((256, 192), [])])
    return ground_truth, sampler.sample(ground_truth, number, 0)


def filter_matrix(side, number, ratio):
    """(number, side): each pixel is the mean of ``ratio`` linear samples; zero outside."""
    position = (torch.arange(number * ratio) + 0.5) * side / (number * ratio) - 0.5
    hat = 1 - (position[:, None] - torch.arange(side)).abs()
    return hat.clamp(min=0).view(number, ratio, side).mean(dim=1)


@pytest.mark.parametrize("chunk", [1, 700, 2**20])
@pytest.mark.parametrize(
    "size, scale, ratio",
    [((76, 102), 0.5, 2), ((75, 101), 0.5, 2), ((60, 45), 2**-1.5, 3), ((3, 1), 0.25, 4),
     ((33, 50), 2**0.5, 1)],
)  # fmt: skip
def test_a_scaled_image_is_averaged_in_bands(size, scale, ratio, chunk, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(image_canvas, "_CHUNK_SAMPLES", chunk)
    image = torch.randn(2, *size)
    scaled = scale_image(image, scale)
    rows, columns = (max(round(side * scale), 1) for side in size)
    vertical = filter_matrix(size[0], rows, ratio)
    horizontal = filter_matrix(size[1], columns, ratio)
    torch.testing.assert_close(scaled, vertical @ image @ horizontal.T, atol=1e-4, rtol=0)
    if size == (76, 102):
        torch.testing.assert_close(scaled, F.avg_pool2d(image, 2))
    assert scale_image(image, 1.0) is image


def test_an_enlarged_image_is_bilinear_but_for_the_border():
    image = torch.randn(3, 20, 31)
    scaled = scale_image(image, 2.0)
    expected = F.interpolate(image[None], scale_factor=2.0, mode="bilinear")[0]
    assert scaled.shape == expected.shape
    torch.testing.assert_close(scaled[:, 1:-1, 1:-1], expected[:, 1:-1, 1:-1], atol=1e-4, rtol=0)


@torch.no_grad()
def test_windows_are_float32_and_in_their_places_under_autocast():
    network = build_network(patch_size=64)
    image = torch.randn(3, 48, 1333)
    expected = predict_windows(network, nn.Identity(), image, [1.0], 10**6)
    with torch.autocast("cpu", torch.bfloat16):
        windows = predict_windows(network, nn.Identity(), image, [1.0], 10**6)
    for value in (windows.score_logits, windows.mask_logits, windows.frames):
        assert value.dtype == torch.float32
    # Another order, as scores differ a little; the same frames to the last bit.
    assert set(map(tuple, windows.frames.tolist())) == set(map(tuple, expected.frames.tolist()))
    torch.testing.assert_close(windows.score_logits, expected.score_logits, atol=0.1, rtol=0)


@torch.no_grad()
def test_patches_with_less_context_than_a_cell_sees_differ():
    network = build_network(patch_size=96)
    image = torch.randn(3, 150, 180)
    masks, scores = dense(network, image, 64)
    difference = {}
    for context in (0, 16, 32, 48, 64):
        patch_masks, patch_scores = patch_by_patch(network, image, context)
        difference[context] = max(
            float((patch_masks - masks).abs().max()), float((patch_scores - scores).abs().max())
        )
    print(f"largest difference by context: {difference}, deviation {masks.std():.3f}")
    assert difference[64] < 1e-5
    assert difference[0] > difference[16] > difference[32] > 1e-4
    assert difference[0] > 0.1 * float(masks.std())


@pytest.mark.slow
@torch.no_grad()
def test_dense_inference_equals_patches_at_full_size():
    torch.manual_seed(0)
    network = build_from_config(make_cfg("deepmask_rpn_only.yaml")).eval()
    image = torch.randn(3, 50, 70)
    masks, scores = patch_by_patch(network, image, 64)
    dense_masks, dense_scores = dense(network, image, 64)
    torch.testing.assert_close(dense_masks, masks, atol=1e-4, rtol=0)
    torch.testing.assert_close(dense_scores, scores, atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [(64, 96), (65, 111), (7, 3), (1, 1), (300, 2)])
@torch.no_grad()
def test_windows_are_centred_on_every_sixteenth_pixel(size):
    network = build_network(patch_size=64)
    windows = predict_windows(network, nn.Identity(), torch.randn(3, *size), [1.0], 10**6)
    height, width = size
    centers = (windows.frames[:, :2] + windows.frames[:, 2:]) / 2 * torch.tensor([width, height])
    expected = {(16 * x, 16 * y) for y in range(height // 16 + 1) for x in range(width // 16 + 1)}
    assert {(round(x), round(y)) for x, y in centers.tolist()} == expected
    assert len(centers) == len(expected)
    sides = (windows.frames[:, 2:] - windows.frames[:, :2]) * torch.tensor([width, height])
    torch.testing.assert_close(sides, torch.full_like(sides, 64.0), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_an_object_is_found_where_it_is():
    # A score head that reads brightness: the best window is that around the bright square.
    network = build_network(patch_size=64, stages=((1,), (1,), (1,)))
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    for layer in network.trunk.features:
        if isinstance(layer, nn.Conv2d):
            layer.weight[:, :, 1, 1] = 1 / layer.in_channels
    # One unit: for the map's middle cells, against the others.
    middle = torch.full((8, 8), -1.0)
    middle[3:5, 3:5] = 1
    network.score_head.fc1.weight[0] = middle.flatten()
    network.score_head.fc2.weight[0, 0] = network.score_head.fc3.weight[0, 0] = 1
    image = torch.zeros(3, 100, 140)
    image[:, 40:56, 96:112] = 1  # centre (104, 48)
    windows = predict_windows(network, nn.Identity(), image, [1.0], 1)
    expected = torch.tensor([[72.0, 16, 136, 80]]) / torch.tensor([140, 100, 140, 100])
    torch.testing.assert_close(windows.frames, expected)


@torch.no_grad()
def test_windows_of_all_scales_compete_by_score():
    network = build_network(patch_size=64)
    image = torch.randn(3, 80, 60)
    together = predict_windows(network, nn.Identity(), image, [0.5, 1.0, 1.7], 20)
    alone = [predict_windows(network, nn.Identity(), image, [s], 10**6) for s in (0.5, 1.0, 1.7)]
    scores = torch.cat([x.score_logits for x in alone])
    best = scores.argsort(descending=True)[:20]
    assert torch.equal(together.score_logits, scores[best])
    assert torch.equal(together.frames, torch.cat([x.frames for x in alone])[best])
    torch.testing.assert_close(
        together.mask_logits, torch.cat([x.mask_logits for x in alone])[best]
    )


def brighten(pixels):
    """A normalisation under which the border is not zero, unlike what convolutions pad with."""
    return pixels * 2 + torch.tensor([0.5, -1.0, 0.25])[:, None, None]


def make_canvas(image, network, scale=1.0, normalize=brighten):
    return ImageCanvas(
        image, scale, patch_size=network.patch_size, context=network.context,
        stride=network.stride, normalize=normalize,
    )  # fmt: skip


def whole_canvas(canvas):
    """All of it, put together by hand."""
    pixels = canvas.image_pixels()
    whole = canvas.border_pixel()[:, None, None].repeat(1, *canvas.size)
    before, (height, width) = canvas.before, canvas.image_size
    whole[:, before : before + height, before : before + width] = pixels
    return whole


@pytest.mark.parametrize("context", [0, 32])
@pytest.mark.parametrize("scale", [1.0, 0.5, 1.7])
def test_rows_of_a_canvas(context, scale):
    network = build_network(patch_size=64, context=context)
    canvas = make_canvas(torch.randn(3, 37, 50), network, scale)
    whole = whole_canvas(canvas)
    height, width = canvas.image_size
    before = 32 + context
    assert canvas.size == (height // 16 * 16 + 2 * before, width // 16 * 16 + 2 * before)
    for first in range(0, canvas.size[0], 9):
        for last in (first + 1, first + 16, canvas.size[0]):
            rows = canvas.rows(first, min(last, canvas.size[0]))
            torch.testing.assert_close(rows, whole[:, first:last], atol=1e-4, rtol=0)


# Without a border of its own (the size and stride of a patch), with a narrow and a wide one.
@pytest.mark.parametrize("patch_size, context", [(32, 0), (64, 0), (160, 0), (64, 64), (224, 0)])
@pytest.mark.parametrize("size", [(100, 160), (16, 320), (300, 7), (1, 1), (33, 31)])
@torch.no_grad()
def test_the_border_of_a_canvas_is_computed_once(patch_size, context, size):
    network = build_network(patch_size=patch_size, context=context)
    canvas = make_canvas(torch.randn(3, *size), network)
    (expected,) = network.trunk(whole_canvas(canvas)[None]).values()
    trunk = TrunkMaps(network.trunk)
    for _ in range(2):  # the second time without computing the border
        (maps,) = trunk.bands(canvas)
        torch.testing.assert_close(maps, expected[0], atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_small_image_costs_a_fraction_of_its_canvas():
    network = build_network()
    canvas = make_canvas(torch.randn(3, 128, 128), network)
    trunk = TrunkMaps(network.trunk)
    next(trunk.bands(canvas))
    counts = []
    for run in (
        lambda: next(trunk.bands(canvas)),
        lambda: network.trunk(whole_canvas(canvas)[None]),
    ):
        with FlopCounterMode(display=False) as counter:
            run()
        counts.append(counter.get_total_flops())
    # The layers see 1 to 59 pixels around the image, of the 112 that there are: at most.
    assert (128 / 352) ** 2 < counts[0] / counts[1] < ((128 + 64) / 352) ** 2


@torch.no_grad()
def test_normalisation_in_a_trunk_and_trunks_of_other_kinds():
    class Other(Backbone):
        """A trunk whose layers nobody knows."""

        stride, context = 8, 16

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 9, stride=8, padding=4)

        def forward(self, x):
            return {"map": self.conv(x)}

        def output_shape(self):
            return {"map": ShapeSpec(channels=5, stride=8)}

    normalised = VGG(stages=((4,), (6,), (8, 8)), norm="BN").eval()
    for layer in normalised.features:
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean)
            nn.init.normal_(layer.bias)
    for trunk in (Other(), normalised):
        canvas = ImageCanvas(
            torch.randn(3, 50, 70), 1.0, patch_size=64, context=0, stride=trunk.stride,
            normalize=brighten,
        )  # fmt: skip
        (expected,) = trunk(whole_canvas(canvas)[None]).values()
        (maps,) = TrunkMaps(trunk).bands(canvas)
        torch.testing.assert_close(maps, expected[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(256, 320), (32, 640), (640, 48), (16, 16)])
@pytest.mark.parametrize("tile_pixels", [2**13, 2**15, 2**17])
@torch.no_grad()
def test_tiles_give_the_map_of_the_whole_image(size, tile_pixels, monkeypatch):
    network = build_network(patch_size=32)
    canvas = make_canvas(torch.randn(3, *size), network)
    (expected,) = network.trunk(whole_canvas(canvas)[None]).values()
    seen = []
    network.trunk.register_forward_pre_hook(lambda module, x: seen.append(x[0][0, 0].numel()))
    monkeypatch.setattr(trunk_maps, "TILE_PIXELS", tile_pixels)
    bands = list(TrunkMaps(network.trunk).bands(canvas))
    torch.testing.assert_close(torch.cat(bands, dim=1), expected[0], atol=1e-5, rtol=0)
    # What a tile shares with its neighbours, 64 pixels on each side, can be all there is of it.
    assert max(seen, default=0) <= max(tile_pixels, (128 + 16) ** 2)
    if math.prod(canvas.size) > 4 * tile_pixels:
        assert len(seen) > 1


@pytest.mark.parametrize("shared, context", [(True, 0), (False, 64)])
@torch.no_grad()
def test_bands_of_a_large_image_give_the_windows_of_the_whole(shared, context, monkeypatch):
    # In double precision, but for the results: what is compared is not the order of sums.
    network = build_network(patch_size=64, shared=shared, context=context).double()
    image = torch.randn(3, 120, 104, dtype=torch.float64)
    arguments = (network, nn.Identity(), image, [0.5, 1.0])
    expected = [predict_windows(*arguments, topk) for topk in (25, 10**6)]
    monkeypatch.setattr(trunk_maps, "TILE_PIXELS", 2**15)
    monkeypatch.setattr(dense_inference, "_SCORED_WINDOWS", 20)
    monkeypatch.setattr(dense_inference, "_WAITING_NUMBERS", 500)
    calls = []
    choose = dense_inference._choose

    def spy(network, best, bands, topk):
        calls.append(sum(x.embedded.numel() for x in bands[:-1]))
        return choose(network, best, bands, topk)

    monkeypatch.setattr(dense_inference, "_choose", spy)
    for topk, whole in zip((25, 10**6), expected, strict=True):
        windows = predict_windows(*arguments, topk)
        for name in ("score_logits", "mask_logits"):
            torch.testing.assert_close(
                getattr(windows, name), getattr(whole, name), atol=1e-6, rtol=0
            )
        assert torch.equal(windows.frames, whole.frames)
    assert len(calls) >= 4 and max(calls) <= 500


@torch.no_grad()
def test_equal_scores_keep_their_order_in_bands(monkeypatch):
    network = build_network(patch_size=64)
    nn.init.zeros_(network.score_head.fc3.weight)
    image = torch.randn(3, 200, 144)
    whole = predict_windows(network, nn.Identity(), image, [0.5, 1.0], 90)
    monkeypatch.setattr(trunk_maps, "TILE_PIXELS", 2**15)
    monkeypatch.setattr(dense_inference, "_WAITING_NUMBERS", 0)
    windows = predict_windows(network, nn.Identity(), image, [0.5, 1.0], 90)
    assert torch.equal(windows.frames, whole.frames)
    # All of the first scale, row by row, then the beginning of the second.
    rows, columns = 100 // 16 + 1, 72 // 16 + 1
    centers = (windows.frames[:, :2] + windows.frames[:, 2:]) / 2
    first = centers[: rows * columns] * torch.tensor([72, 100])
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    expected = torch.stack([x, y], dim=2).reshape(-1, 2) * 16.0
    torch.testing.assert_close(first, expected, atol=1e-3, rtol=0)
    second = centers[rows * columns :][:3] * torch.tensor([144, 200])
    torch.testing.assert_close(
        second, torch.tensor([[0.0, 0], [16, 0], [32, 0]]), atol=1e-3, rtol=0
    )


@pytest.mark.parametrize("scale", [0.3, 0.5, 1.0, 1.6])
def test_rows_of_a_scaled_image_are_those_of_the_whole(scale):
    image = torch.randn(3, 90, 40)
    whole = scale_image(image, scale)
    for first in range(0, whole.shape[1], 7):
        for last in range(first, whole.shape[1] + 1, 5):
            rows = scale_image(image, scale, (first, last))
            torch.testing.assert_close(rows, whole[:, first:last], atol=1e-4, rtol=0)
