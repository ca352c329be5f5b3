"""What every generator promises, of a small network with what the released one has of its own."""

import pytest
import torch
from torch import nn

from d2proposals.backbones.torchvision_backbone import TorchvisionBackbone
from d2proposals.deepmask import DeepMaskNetwork, MaskHead, dense_inference, trunk_maps
from d2proposals.deepmask.branch_weights import combine_branches
from d2proposals.deepmask.dense_inference import predict_windows
from d2proposals.deepmask.image_canvas import CanvasStyle
from d2proposals.deepmask.score_head import CodeScoreHead
from d2proposals.deepmask.shared_code import SharedCode
from tests import test_contract

RELEASED = {
    "CONTEXT": 8, "BORDER": "half_patch", "BORDER_COLOR": (127.5,) * 3,
    "RESAMPLING": "bilinear_corners", "SHARED_CODE": True, "SCORE_DIMS": (8,),
    "UPSAMPLING": "bilinear_corners", "TARGET_SIZE": 16,
}  # fmt: skip
CONTRACT = [
    test_contract.test_a_training_step_reaches_every_trainable_parameter,
    test_contract.test_evaluation_runs_and_is_deterministic,
    test_contract.test_state_dict_round_trip,
    test_contract.test_explicit_constructor_equals_from_config,
]


@pytest.fixture(autouse=True)
def released_settings(monkeypatch):
    overrides = [x for key, value in RELEASED.items() for x in (f"MODEL.DEEPMASK.{key}", value)]
    settings = test_contract.GENERATORS["DeepMask"] + overrides
    monkeypatch.setitem(test_contract.GENERATORS, "DeepMask", settings)
    torch.manual_seed(1)


@pytest.mark.parametrize("promise", CONTRACT, ids=lambda test: test.__name__)
def test_the_contract(promise):
    promise("DeepMask", "ProposalNetwork")


def test_the_contract_in_a_detector():
    for promise in CONTRACT[:2]:
        promise("DeepMask", "FasterRCNN")


@pytest.mark.parametrize("boxes", [([], []), ([[3, 3, 4, 4]], [[-20, -20, 300, 300]])])
def test_training_survives_images_without_and_with_strange_objects(boxes):
    test_contract.test_training_survives_images_without_and_with_strange_objects(
        "DeepMask", "ProposalNetwork", boxes
    )


def test_proposals():
    test_contract.test_proposals_have_the_two_fields_in_order_clipped_and_limited("DeepMask")
    test_contract.test_proposals_of_an_image_do_not_depend_on_the_padding_of_its_batch("DeepMask")


def build_network():
    """Narrow heads on a real trunk of another kind than VGG."""
    torch.manual_seed(0)
    trunk = TorchvisionBackbone(
        name="resnet18", out_features=["stride8"], padding="symmetric", norm="FrozenBN"
    )
    return DeepMaskNetwork(
        trunk=trunk,
        shared_code=SharedCode(in_channels=128, map_size=6, channels=5, code_dim=7),
        mask_head=MaskHead(in_channels=7, map_size=1, patch_size=48, channels=None, code_dim=0,
                           mask_size=12, upsampling="bilinear_corners"),
        score_head=CodeScoreHead(code_dim=7, hidden_dims=(9,)),
        patch_size=48,
        canvas_style=CanvasStyle("half_patch", (), "bilinear_corners"),
    ).eval()  # fmt: skip


@torch.no_grad()
def test_tiles_and_bands_of_a_large_image_give_the_windows_of_the_whole(monkeypatch):
    # In double precision, but for the results; sides that are no multiples of the stride.
    network = build_network().double()
    image = torch.randn(3, 205, 171, dtype=torch.float64)
    arguments = (network, nn.Identity(), image, [0.5, 1.0], 10**6)
    whole = predict_windows(*arguments)
    assert len(whole.frames) == (26 + 1) * (22 + 1) + (13 + 1) * (11 + 1)
    monkeypatch.setattr(trunk_maps, "TILE_PIXELS", 2**15)
    monkeypatch.setattr(dense_inference, "_SCORED_WINDOWS", 20)
    monkeypatch.setattr(dense_inference, "_WAITING_NUMBERS", 500)
    seen = []
    network.trunk.register_forward_pre_hook(lambda module, x: seen.append(x[0].shape))
    windows = predict_windows(*arguments)
    assert len(seen) > 4
    for name in ("score_logits", "mask_logits", "frames"):
        torch.testing.assert_close(
            getattr(windows, name), getattr(whole, name), atol=1e-6, rtol=1e-6
        )


def test_dropout_is_before_both_layers_of_the_score():
    head = CodeScoreHead(code_dim=400, hidden_dims=(300,), dropout=0.5).train()
    seen = []
    head.dropout.register_forward_hook(lambda module, x, y: seen.append((x[0], y)))
    head(torch.rand(4, 400, 1, 1) + 0.1)
    assert [x.shape[-1] for x, _ in seen] == [400, 300]
    for before, after in seen:
        kept = after[before > 0] > 0
        assert 0.35 < kept.float().mean() < 0.65


def test_branches_that_share_a_code_are_not_taken_apart():
    prefix = "proposal_generator.network."
    weights = {prefix + key: value for key, value in build_network().state_dict().items()}
    with pytest.raises(ValueError, match="The segmentation model's branches share a code"):
        combine_branches(weights, weights)
