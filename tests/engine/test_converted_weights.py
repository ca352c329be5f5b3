"""Public weights as tools/convert_weights.py writes them, as the start of a part."""

import logging

import pytest
import torch
import torchvision
from detectron2.modeling import build_model

from d2proposals.backbones.alexnet import AlexNet
from d2proposals.backbones.deeplab_largefov import DeepLabLargeFOV
from d2proposals.backbones.vgg import VGG
from d2proposals.engine import ProposalCheckpointer, load_part_weights
from tests.common import CONFIGS, make_cfg
from tools.convert_weights import main

# Trunks at full size, which the tool asks for, under small branches.
SMALL_DEEPMASK = ["MODEL.DEEPMASK.CODE_DIM", 4, "MODEL.DEEPMASK.MASK_CHANNELS", 4,
                  "MODEL.DEEPMASK.SCORE_DIMS", (4, 4)]  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "flags", "config", "overrides", "trunk", "copies"),
    [
        ("vgg11", [], "deepmask", SMALL_DEEPMASK, VGG, 1),
        ("vgg11", ["--separate-trunks"], "deepmask",
         [*SMALL_DEEPMASK, "MODEL.DEEPMASK.SHARED_TRUNK", False], VGG, 2),
        ("vgg16", ["--single-network"], "spop", ["MODEL.SPOP.SCALE_AWARE", False],
         DeepLabLargeFOV, 2),
        ("alexnet", ["--config-file", "CONFIG"], "detectornet",
         ["MODEL.DETECTORNET.NETWORKS", "shared"], AlexNet, 1),
    ],
)  # fmt: skip
def test_a_generator_starts_from_a_converted_file(
    architecture, flags, config, overrides, trunk, copies, tmp_path, caplog
):
    torch.manual_seed(0)
    with torch.device("meta"):
        state = torchvision.models.get_model(architecture).state_dict()
    public = {name: torch.randn(value.shape) * 0.01 for name, value in state.items()}
    torch.save(public, tmp_path / "in.pth")
    cfg = make_cfg(f"{config}_rpn_only.yaml", "MODEL.WEIGHTS", "", *overrides)
    (tmp_path / "model.yaml").write_text(
        f"_BASE_: {CONFIGS / f'{config}_rpn_only.yaml'}\nMODEL:\n  DETECTORNET:\n"
        "    NETWORKS: shared\n"
    )
    flags = [str(tmp_path / "model.yaml") if flag == "CONFIG" else flag for flag in flags]
    path = str(tmp_path / "out.pkl")
    main(["--architecture", architecture, *flags, str(tmp_path / "in.pth"), path])

    cfg.MODEL.PROPOSAL_GENERATOR.WEIGHTS = path
    model = build_model(cfg)
    with caplog.at_level(logging.WARNING, logger="d2proposals"):
        load_part_weights(cfg, ProposalCheckpointer(model))
    (record,) = [x for x in caplog.records if x.name.startswith("d2proposals")]
    assert "start from random values" in record.getMessage()
    trunks = [module for module in model.proposal_generator.modules() if isinstance(module, trunk)]
    assert len(trunks) == copies
    convolutions = [
        [module.weight for module in network.modules() if isinstance(module, torch.nn.Conv2d)]
        for network in trunks
    ]
    expected = [x for name, x in public.items() if name.startswith("features.") and x.dim() == 4]
    assert len(expected) >= 5
    for weights in convolutions:
        for ours, theirs in zip(weights, expected, strict=False):
            assert torch.equal(ours, theirs)
