"""DeepMask's network: its size, its variants, and dense inference against patches one by one."""

import pytest
import torch
import torch.nn.functional as F

from d2proposals.deepmask import MaskHead, ScoreHead
from d2proposals.deepmask.network import build_network as build_from_config
from d2proposals.deepmask.score_head import CodeScoreHead
from tests.common import make_cfg
from tests.deepmask.deepmask_networks import STAGES, build_network

SHARED_CODE = ["MODEL.DEEPMASK.SHARED_CODE", True, "MODEL.DEEPMASK.SCORE_DIMS", (1024,)]


def num_parameters(module):
    return sum(p.numel() for p in module.parameters())


def test_parameters_of_the_paper_s_network():
    # Sec. 3.4: "around 75M".
    with torch.device("meta"):
        network = build_from_config(make_cfg("deepmask_rpn_only.yaml"))
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
        network = build_from_config(
            make_cfg("deepmask_rpn_only.yaml", "MODEL.DEEPMASK.CODE_DIM", 0)
        )
    assert num_parameters(network) == pytest.approx(337.6e6, rel=1e-3)
    assert num_parameters(network.mask_head.classify) == (14 * 14 * 512 + 1) * 56 * 56


def test_zoom_has_the_same_network_and_one_scale_more():
    deepmask, zoom = make_cfg("deepmask_rpn_only.yaml"), make_cfg("deepmask_zoom_rpn_only.yaml")
    scales = tuple(deepmask.MODEL.DEEPMASK.LOG2_SCALES)
    assert scales == (-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0)  # Sec. 3.4
    assert tuple(zoom.MODEL.DEEPMASK.LOG2_SCALES) == (*scales, 1.5)


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


def test_dropout_of_the_later_network_is_before_both_layers():
    head = CodeScoreHead(code_dim=200, hidden_dims=(300,), dropout=0.5).train()
    seen = []
    head.dropout.register_forward_hook(lambda module, x, y: seen.append((x[0], y)))
    head(torch.rand(4, 200, 1, 1) + 1)
    assert [x.shape[-1] for x, _ in seen] == [200, 300]
    for before, after in seen:
        assert 0.35 < (after[before > 0] > 0).float().mean() < 0.65


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
    monkeypatch.setattr("d2proposals.deepmask.mask_head._CHUNK_NUMBERS", chunk)
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
        (["MODEL.DEEPMASK.TARGET_SIZE", -1], "TARGET_SIZE must be at least 0"),
        (
            ["MODEL.DEEPMASK.TARGET_SIZE", 112, "MODEL.DEEPMASK.UPSAMPLING", "none"],
            "'none' trains masks of a size of its own: set MODEL.DEEPMASK.TARGET_SIZE 0",
        ),
        (
            ["MODEL.DEEPMASK.UPSAMPLING", "bilinear_corners", "MODEL.DEEPMASK.MASK_SIZE", 1],
            "MASK_SIZE must be at least 2",
        ),
        (["MODEL.DEEPMASK.BORDER", "none"], "BORDER must be one of"),
        (["MODEL.DEEPMASK.BORDER_COLOR", (1.0,)], "BORDER_COLOR needs three numbers"),
        (["MODEL.DEEPMASK.RESAMPLING", "nearest"], "RESAMPLING must be one of"),
        (["MODEL.DEEPMASK.SHARED_CODE", True], "SCORE_DIMS needs one number"),
        (
            [*SHARED_CODE, "MODEL.DEEPMASK.CODE_DIM", 0],
            "CODE_DIM must be at least 1 with SHARED_CODE True",
        ),
        ([*SHARED_CODE, "MODEL.DEEPMASK.MASK_CHANNELS", 0], "MASK_CHANNELS must be at least 1"),
        ([*SHARED_CODE, "MODEL.DEEPMASK.SHARED_TRUNK", False], "needs SHARED_TRUNK True"),
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
        build_from_config(make_cfg("deepmask_rpn_only.yaml", *overrides))


def test_stages_of_the_tests_are_those_of_the_paper():
    assert [len(stage) for stage in STAGES] == [1, 1, 2, 2, 2]


@torch.no_grad()
def test_patches_go_through_the_trunk_with_the_channels_of_a_pixel_side_by_side():
    network = build_network(patch_size=64)
    patches = torch.randn(3, 3, 64, 64)
    (maps,) = network.trunk(patches).values()
    layouts = []
    network.trunk.register_forward_pre_hook(
        lambda module, x: layouts.append(x[0].is_contiguous(memory_format=torch.channels_last))
    )
    masks, scores = network.mask_and_score_logits(patches, 2)
    assert layouts == [True]
    expected = network.mask_head(network.mask_head.embed(maps[:2]))
    torch.testing.assert_close(masks, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(scores, network.score_head(maps), atol=1e-5, rtol=0)
