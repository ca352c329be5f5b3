"""Configuration keys of SPOP reach its parts, and the paper's configuration is the paper's."""

import pytest
import torch
from detectron2.modeling import build_proposal_generator
from detectron2.utils import comm

from tests.common import make_cfg, set_all

SETTINGS = {
    "TRUNK.NAME": "build_torchvision_backbone",
    "TRUNK.WIDTH_FACTOR": 0.25,
    "TRUNK.NORM": "GN",
    "TRUNK.DROPOUT": 0.25,
    "TRUNK.FORMAT": "BGR",
    "TRUNK.PIXEL_MEAN": (104.0, 117.0, 123.0),
    "TRUNK.PIXEL_STD": (1.0, 2.0, 4.0),
    "HEAD_CHANNELS": 24,
    "NORMALIZER": 256.0,
    "SCALE_AWARE": False,
    "LARGE_AREA": 1000.0,
    "SAMPLES_PER_LARGE_OBJECT": 50,
    "BBOX_REG_LOSS_TYPE": "l2",
    "BBOX_REG_LOSS_WEIGHT": 2.0,
    "OBJECTNESS_LOSS_WEIGHT": 3.0,
    "SIZE_LOSS_WEIGHT": 5.0,
    "LOSS_WEIGHT": 7.0,
    "NEW_LAYER_LR_FACTOR": 4.0,
    "SCALES": (0.5, 1.0, 3.0),
    "NATIVE_SHORT_EDGE": 300,
    "NATIVE_LONG_EDGE": 700,
    "TRAIN_AT_NATIVE_SIZE": True,
    "LOCALIZATION": "small_size",
    "TILE_SIZE": 512,
    "REFINEMENT.ENABLED": False,
    "REFINEMENT.NUM_SUPERPIXELS": 77,
    "REFINEMENT.COMPACTNESS": 20.0,
    "REFINEMENT.SIGMA": 1.5,
    "REFINEMENT.STRADDLING": "boxes",
    "PRE_NMS_TOPK_TRAIN": 51,
    "PRE_NMS_TOPK_TEST": 52,
    "NMS_THRESH": 0.625,
    "POST_NMS_TOPK_TRAIN": 31,
    "POST_NMS_TOPK_TEST": 32,
    "MIN_BOX_SIZE": 7.0,
}


def build(*overrides):
    cfg = make_cfg(
        None,
        *set_all("SPOP", SETTINGS), "MODEL.SPOP.TRUNK.NAME", "deeplab_largefov",
        "MODEL.PROPOSAL_GENERATOR.NAME", "SPOP",
        "MODEL.PROPOSAL_GENERATOR.PROPOSALS_IN_TRAINING", False,
        "INPUT.FORMAT", "BGR", *overrides,
    )  # fmt: skip
    return build_proposal_generator(cfg, {})


def test_every_key_reaches_the_generator():
    # The size network alone is an error without scale-awareness; that is tested elsewhere.
    generator = build("MODEL.SPOP.LOCALIZATION", "fused")
    held = {
        "samples_per_large_object": 50,
        "box_reg_loss_type": "l2",
        "loss_weight": {
            "loss_spop_objectness": 21.0,
            "loss_spop_size": 35.0,
            "loss_spop_all_sizes": 14.0,
        },
        "trains_at_native_size": True,
        "scales": (0.5, 1.0, 3.0),
        "refinement": None,
        "pre_nms_topk": {True: 51, False: 52},  # by whether it trains
        "nms_thresh": 0.625,
        "post_nms_topk": {True: 31, False: 32},
        "min_box_size": 7.0,
        "proposals_in_training": False,
    }
    assert {name: getattr(generator, name) for name in held} == held
    assert (generator.native_sizes.short_edge, generator.native_sizes.long_edge) == (300, 700)
    labeler, networks = generator.labeler, generator.networks
    assert (labeler.stride, labeler.normalizer, labeler.large_area) == (8, 256.0, 1000.0)
    assert list(networks.localization) == ["all_sizes"] and networks.confidence.size is None
    assert (networks.tile_size, networks.normalizer) == (512, 256.0)
    assert networks.confidence.objectness[0].out_channels == 24
    assert networks.confidence.objectness.lr_factor == 4.0
    assert networks.localization["all_sizes"].offset.lr_factor == 4.0
    for trunk in (networks.confidence.trunk, networks.localization["all_sizes"].trunk):
        assert (trunk.fc7.out_channels, trunk.dropout) == (256, 0.25)
        assert isinstance(trunk.fc7.norm, torch.nn.GroupNorm)


def test_keys_of_the_two_networks_and_of_the_refinement_reach_them():
    generator = build("MODEL.SPOP.SCALE_AWARE", True, "MODEL.SPOP.REFINEMENT.ENABLED", True)
    networks, refinement = generator.networks, generator.refinement
    assert networks.localization_at_test == "small_size"
    assert list(networks.localization) == ["large_size", "small_size"]
    assert networks.confidence.size.lr_factor == 4.0
    assert generator.loss_weight["loss_spop_large_size"] == 14.0
    settings = (refinement.num_superpixels, refinement.compactness, refinement.straddling)
    assert settings == (77, 20.0, "boxes") and refinement.sigma == 1.5


def test_the_trunk_gets_the_pixels_that_its_weights_expect():
    networks = build("MODEL.SPOP.LOCALIZATION", "fused", "INPUT.FORMAT", "RGB",
                     "MODEL.PIXEL_MEAN", [0.0, 0.0, 0.0]).networks  # fmt: skip
    # RGB (10, 20, 30) in [0, 255] is BGR (30, 20, 10).
    pixels = networks.pixel_normalization(torch.tensor([10.0, 20.0, 30.0]).view(3, 1, 1))
    assert pixels.flatten().tolist() == [30 - 104, (20 - 117) / 2, (10 - 123) / 4]


def test_the_paper_s_configuration_is_the_paper_s_network():
    cfg = make_cfg("spop_rpn_only.yaml")
    node = cfg.MODEL.SPOP
    assert node.TRUNK.WIDTH_FACTOR == 1.0 and node.TRUNK.NORM == ""  # Table I
    assert node.HEAD_CHANNELS == 1024 and node.SCALE_AWARE  # Fig. 5, Sec. III-B
    assert cfg.INPUT.WARP_SIZE == (513, 513) and node.NORMALIZER == 513
    assert cfg.INPUT.MIN_SIZE_TEST == 0 and node.SCALES == (1.0, 2.0)  # Sec. III-C
    assert node.LARGE_AREA == 2000 and node.SAMPLES_PER_LARGE_OBJECT == 100
    assert node.LOCALIZATION == "fused" and node.REFINEMENT.ENABLED and node.NMS_THRESH == 0.8
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.GAMMA) == (0.001, 8, 0.1)
    assert node.NEW_LAYER_LR_FACTOR == 10
    # 20, 40 and 60 epochs of 11,355 images in batches of 8.
    epochs = [x * 8 / 11355 for x in (*cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER)]
    assert epochs == pytest.approx([20, 40, 60], abs=0.001)


def test_synchronised_statistics_need_images_of_one_size(monkeypatch):
    # One process waits for none.
    native = ("MODEL.SPOP.SCALE_AWARE", True, "MODEL.SPOP.TRAIN_AT_NATIVE_SIZE", True)
    build("MODEL.SPOP.TRUNK.NORM", "SyncBN", "INPUT.WARP_SIZE", (), *native)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="'SyncBN' in several processes needs INPUT.WARP_SIZE"):
        build("MODEL.SPOP.TRUNK.NORM", "SyncBN", "INPUT.WARP_SIZE", ())
    with pytest.raises(ValueError, match="TRAIN_AT_NATIVE_SIZE False"):
        build("MODEL.SPOP.TRUNK.NORM", "SyncBN", "INPUT.WARP_SIZE", (65, 65))
    torchvision = (
        "MODEL.SPOP.TRUNK.NAME", "build_torchvision_backbone", "MODEL.TORCHVISION.NORM", "SyncBN",
    )  # fmt: skip
    with pytest.raises(
        ValueError,
        match="MODEL.TORCHVISION.NORM 'SyncBN' in several processes needs INPUT.WARP_SIZE",
    ):
        build(*torchvision, "INPUT.WARP_SIZE", ())
    scale_aware = ("MODEL.SPOP.SCALE_AWARE", True, "MODEL.SPOP.TRAIN_AT_NATIVE_SIZE", False)
    build("MODEL.SPOP.TRUNK.NORM", "SyncBN", "INPUT.WARP_SIZE", (65, 65), *scale_aware)


TORCHVISION = ("MODEL.SPOP.TRUNK.NAME", "build_torchvision_backbone",
               "MODEL.TORCHVISION.NAME", "shufflenet_v2_x0_5",
               "MODEL.TORCHVISION.NORM", "BN")  # fmt: skip


def test_a_network_of_torchvision_is_a_trunk_at_the_paper_s_stride():
    one_map = ("MODEL.TORCHVISION.OUT_FEATURES", ["stride8"], "MODEL.TORCHVISION.MAX_STRIDE", 8)
    networks = build(*TORCHVISION, *one_map, "MODEL.SPOP.LOCALIZATION", "fused").networks
    confidence = networks.confidence
    assert confidence.stride == 8
    assert confidence.receptive_field == confidence.trunk.receptive_field + 4 * 8
    maps = confidence(torch.randn(1, 3, 65, 100))
    # As many cells as are centred inside the image.
    assert maps.objectness.shape == (1, 2, 9, 13)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["MODEL.SPOP.TRUNK.NAME", "resnet"], "Unknown MODEL.SPOP.TRUNK.NAME 'resnet'"),
        (["MODEL.SPOP.TRUNK.NAME", "build_image_backbone"], "needs to know what its cells see"),
        (["MODEL.TORCHVISION.OUT_FEATURES", ["stride8", "stride16"]], "SPOP reads one map"),
        (
            ["MODEL.TORCHVISION.OUT_FEATURES", ["stride4"],
             "MODEL.TORCHVISION.NAME", "convnext_tiny"],
            r"centred on pixel 4 \* i \+ 1.5",
        ),
    ],
)  # fmt: skip
def test_what_is_no_trunk_is_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        build(*TORCHVISION, *overrides, "MODEL.SPOP.LOCALIZATION", "fused")
