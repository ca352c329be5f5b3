"""DeepMask's network: its size, its variants, and dense inference against patches one by one."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.structures import ImageList
from torch import nn

from d2proposals.deepmask import MaskHead, ScoreHead, dense_inference
from d2proposals.deepmask.dense_inference import (
    make_canvas,
    predict_windows,
    scale_image,
    tiled_map,
)
from d2proposals.deepmask.generator import _build_network
from d2proposals.deepmask.patch_sampling import PatchSampler
from d2proposals.proposals.image_pyramid import resize_image, scaled_size
from d2proposals.proposals.patches import crop_patches
from tests.common import make_cfg, make_instances
from tests.deepmask.deepmask_networks import STAGES, build_network


def num_parameters(module):
    return sum(p.numel() for p in module.parameters())


def test_parameters_of_the_paper_s_network():
    # Sec. 3.4: "around 75M".
    with torch.device("meta"):
        network = _build_network(make_cfg("deepmask_rpn_only.yaml"))
    trunk = 9 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 256 + 256 * 512 + 3 * 512 * 512)
    trunk += 64 + 128 + 2 * 256 + 4 * 512
    mask = (512 + 1) * 512 + (14 * 14 * 512 + 1) * 512 + (512 + 1) * 56 * 56
    score = (7 * 7 * 512 + 1) * 512 + (512 + 1) * 1024 + 1024 + 1
    assert num_parameters(network.trunk) == trunk == 9_220_480
    assert num_parameters(network.mask_head) == mask == 53_252_160
    assert num_parameters(network.score_head) == score == 13_371_905
    assert num_parameters(network) == 75_844_545


def test_parameters_of_the_full_rank_network():
    # Sec. 4: "over 300M parameters".
    with torch.device("meta"):
        network = _build_network(make_cfg("deepmask_rpn_only.yaml", "MODEL.DEEPMASK.CODE_DIM", 0))
    assert num_parameters(network) == pytest.approx(337.6e6, rel=1e-3)
    assert num_parameters(network.mask_head.classify) == (14 * 14 * 512 + 1) * 56 * 56


def test_zoom_has_the_same_network_and_one_scale_more():
    deepmask, zoom = make_cfg("deepmask_rpn_only.yaml"), make_cfg("deepmask_zoom_rpn_only.yaml")
    scales = tuple(deepmask.MODEL.DEEPMASK.LOG2_SCALES)
    assert scales == (-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0)  # Sec. 3.4
    assert tuple(zoom.MODEL.DEEPMASK.LOG2_SCALES) == (*scales, 1.5)


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
    monkeypatch.setattr(dense_inference, "_CHUNK_SAMPLES", chunk)
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
    network = _build_network(make_cfg("deepmask_rpn_only.yaml")).eval()
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


@pytest.mark.parametrize("size", [(256, 320), (32, 640), (640, 48), (16, 16)])
@pytest.mark.parametrize("tile_pixels", [2**13, 2**15, 2**17])
@torch.no_grad()
def test_tiles_give_the_map_of_the_whole_image(size, tile_pixels, monkeypatch):
    trunk = build_network().trunk
    canvas = torch.randn(3, *size)
    (expected,) = trunk(canvas[None]).values()
    seen = []
    trunk.register_forward_pre_hook(lambda module, x: seen.append(x[0][0, 0].numel()))
    monkeypatch.setattr(dense_inference, "TILE_PIXELS", tile_pixels)
    torch.testing.assert_close(tiled_map(trunk, canvas), expected[0])
    # What a tile shares with its neighbours, 64 pixels on each side, can be all there is of it.
    assert max(seen) <= max(tile_pixels, (128 + 16) ** 2)
    assert (len(seen) > 1) == (canvas[0].numel() > tile_pixels)


def test_the_canvas_has_the_context_of_patches():
    image = torch.ones(3, 37, 50)
    canvas = make_canvas(image, build_network(patch_size=64, context=32))
    assert canvas.shape == (3, 32 + 64 + 64, 48 + 64 + 64)
    assert canvas[:, 64 : 64 + 37, 64 : 64 + 50].min() == 1 and canvas.sum() == image.sum()


@torch.no_grad()
def test_the_interleaving_trick():
    # As the paper describes it: pooling of the map shifted by 0 or 1 cells, then every second
    # window of each, put back in their places.
    torch.manual_seed(0)
    head = ScoreHead(in_channels=3, map_size=6, hidden_dims=(4, 5)).eval()
    maps = torch.randn(2, 3, 11, 12)
    expected = torch.full((2, 6, 7), torch.nan)
    for dy in (0, 1):
        for dx in (0, 1):
            pooled = F.max_pool2d(maps[:, :, dy:, dx:], 2)
            for y in range(pooled.shape[2] - 2):
                for x in range(pooled.shape[3] - 2):
                    hidden = pooled[:, :, y : y + 3, x : x + 3].flatten(1)
                    hidden = F.relu(head.fc2(F.relu(head.fc1(hidden))))
                    expected[:, 2 * y + dy, 2 * x + dx] = head.fc3(hidden)[:, 0]
    torch.testing.assert_close(head.at_every_window(maps), expected)
    torch.testing.assert_close(head(maps[:, :, 2:8, 3:9]), expected[:, 2, 3])


def test_dropout_is_where_the_paper_has_it():
    head = ScoreHead(in_channels=2, map_size=4, hidden_dims=(200, 300), dropout=0.5).train()
    seen = []
    head.dropout.register_forward_hook(lambda module, x, y: seen.append((x[0], y)))
    head(torch.rand(4, 2, 4, 4))
    assert [tuple(x.shape) for x, _ in seen] == [(4, 200), (4, 300)]
    for before, after in seen:
        assert before.min() >= 0  # after the ReLU
        kept = after[before > 0] > 0
        assert 0.35 < kept.float().mean() < 0.65


@pytest.mark.parametrize("upsampling, side", [("bilinear", 56), ("none", 14), ("trainable", 56)])
def test_up_sampling(upsampling, side):
    torch.manual_seed(0)
    head = MaskHead(
        in_channels=3, map_size=2, patch_size=56, channels=4, code_dim=5, mask_size=14,
        upsampling=upsampling,
    )  # fmt: skip
    assert head.target_size == side
    logits = torch.randn(2, 14, 14)
    expected = F.interpolate(logits[None], size=(56, 56), mode="bilinear", align_corners=False)[0]
    # A transposed convolution begins as bilinear but for the border, where it sees zeros.
    inner = slice(2, -2) if upsampling == "trainable" else slice(None)
    torch.testing.assert_close(head.enlarge(logits)[:, inner, inner], expected[:, inner, inner])
    assert any("upsample" in n for n, _ in head.named_parameters()) == (upsampling == "trainable")


def test_the_low_rank_branch_is_linear_after_its_convolution():
    torch.manual_seed(0)
    head = MaskHead(in_channels=3, map_size=4, patch_size=64, channels=4, code_dim=5, mask_size=8)
    a, b = torch.randn(2, 1, 4, 4, 4)
    difference = head(a + b) - head(a) - head(b) + head(torch.zeros_like(a))
    assert difference.abs().max() < 1e-5
    assert head.embed(torch.randn(1, 3, 4, 4)).min() >= 0  # the ReLU


@pytest.mark.parametrize("chunk", [1, 100, 2**25])
@torch.no_grad()
def test_masks_at_windows_whatever_the_chunk(chunk, monkeypatch):
    monkeypatch.setattr("d2proposals.deepmask.network._CHUNK_NUMBERS", chunk)
    head = build_network(patch_size=64).mask_head
    embedded = torch.randn(6, 9, 11)
    rows, columns = torch.tensor([0, 5, 2]), torch.tensor([7, 0, 3])
    expected = [head(embedded[None, :, y : y + 4, x : x + 4])[0] for y, x in zip(rows, columns)]  # noqa: B905
    torch.testing.assert_close(head.at_windows(embedded, rows, columns), torch.stack(expected))
    assert head.at_windows(embedded, rows[:0], columns[:0]).shape == (0, 16, 16)


def test_new_layers_are_uniform_in_one_over_the_root_of_their_inputs():
    # Sec. 3.4: "weights are initialized randomly from a uniform distribution".
    head = ScoreHead(in_channels=64, map_size=8)
    bound = head.fc1.in_features**-0.5
    weight = head.fc1.weight.detach()
    assert weight.abs().max() <= bound
    assert weight.std() == pytest.approx(bound / 3**0.5, rel=0.02)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["MODEL.DEEPMASK.PATCH_SIZE", 230], "PATCH_SIZE"),
        (["MODEL.DEEPMASK.PATCH_SIZE", 240], "PATCH_SIZE must be an even multiple"),
        (["MODEL.DEEPMASK.CONTEXT", 10], "CONTEXT must be a multiple of 16"),
        (["MODEL.DEEPMASK.CONTEXT", -16], "CONTEXT"),
        (["MODEL.DEEPMASK.UPSAMPLING", "nearest"], "UPSAMPLING"),
        (["MODEL.DEEPMASK.UPSAMPLING", "trainable", "MODEL.DEEPMASK.MASK_SIZE", 50], "MASK_SIZE"),
        (["MODEL.DEEPMASK.SCORE_DIMS", (512,)], "SCORE_DIMS"),
        (["MODEL.DEEPMASK.PATCH_SIZE", 0], "PATCH_SIZE must be a positive multiple"),
        (["MODEL.DEEPMASK.MASK_SIZE", 0], "MASK_SIZE must be at least 1"),
        (["MODEL.DEEPMASK.MASK_CHANNELS", 0], "MASK_CHANNELS must be at least 1"),
        (["MODEL.DEEPMASK.CODE_DIM", -4], "CODE_DIM must be at least 0"),
        (["MODEL.VGG.OUT_FEATURES", ["stage4", "stage5"]], "MODEL.VGG.OUT_FEATURES"),
        (["MODEL.VGG.OUT_FEATURES", ["stage4"]], "at stride 16, but .* stage4 at stride 8"),
        (
            ["MODEL.DEEPMASK.TRUNK", "build_resnet_backbone"],
            "MODEL.DEEPMASK.TRUNK build_resnet_backbone does not say",
        ),
    ],
)
def test_settings_that_make_no_sense(overrides, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        _build_network(make_cfg("deepmask_rpn_only.yaml", *overrides))


def test_stages_of_the_tests_are_those_of_the_paper():
    assert [len(stage) for stage in STAGES] == [1, 1, 2, 2, 2]
