"""Public VGG-16 weights as DeepLab-LargeFOV's, on synthetic files of public names and shapes."""

import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

from d2proposals.backbones.deeplab_largefov import DeepLabLargeFOV
from d2proposals.backbones.largefov_conversion import (
    LARGEFOV_CONVERTERS,
    SINGLE_NETWORKS,
    convert_deeplab_largefov,
    convert_vgg16,
    convert_vgg16_reducedfc,
    spop_weights,
)
from tests.common import make_cfg

TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert_weights.py"
STAGES = (2, 2, 3, 3, 3)
CHANNELS = (64, 128, 256, 512, 512)


def numbered(shape, start=0):
    """A tensor whose values tell where they stood."""
    return torch.arange(start, start + torch.Size(shape).numel(), dtype=torch.float32).view(shape)


def convolutions(names):
    """{name: weight, bias} of VGG-16's thirteen convolutions."""
    state, channels, names = {}, 3, iter(names)
    for count, width in zip(STAGES, CHANNELS, strict=True):
        for _ in range(count):
            name = next(names)
            state[f"{name}.weight"] = torch.full((width, channels, 3, 3), float(len(state)))
            state[f"{name}.bias"] = torch.full((width,), float(len(state)))
            channels = width
    return state


CAFFE_NAMES = [f"conv{s + 1}_{i + 1}" for s, count in enumerate(STAGES) for i in range(count)]


def reduced_classifier(fc6, fc7):
    return {
        f"{fc6}.weight": numbered((1024, 512, 3, 3)),
        f"{fc6}.bias": numbered((1024,)),
        f"{fc7}.weight": numbered((1024, 1024, 1, 1)),
        f"{fc7}.bias": numbered((1024,), 5),
    }


@pytest.fixture(scope="module")
def vgg16():
    with torch.device("meta"):
        state = torchvision.models.vgg16().state_dict()
    generator = torch.Generator().manual_seed(0)
    return {k: torch.randn(v.shape, generator=generator) * 0.01 for k, v in state.items()}


def test_vgg16(vgg16):
    weights = convert_vgg16(vgg16)
    trunk = DeepLabLargeFOV()
    assert trunk.load_state_dict(weights).missing_keys == []
    assert torch.equal(weights["features.28.weight"], vgg16["features.28.weight"])
    # Unit 8 of the classifier is unit 2; places 0, 3 and 6 of seven are places 0, 1 and 2.
    whole = vgg16["classifier.0.weight"].view(4096, 512, 7, 7)
    assert weights["fc6.weight"][2, 5, 1, 2] == whole[8, 5, 3, 6]
    assert weights["fc6.bias"][2] == vgg16["classifier.0.bias"][8]
    assert weights["fc7.weight"][3, 2, 0, 0] == vgg16["classifier.3.weight"][12, 8]
    assert weights["fc7.bias"][3] == vgg16["classifier.3.bias"][12]


def test_decimated_fc6_with_holes_looks_at_every_third_place(vgg16):
    # On a map that is zero but at the kept places, the kept units compute what they did.
    weights = convert_vgg16(vgg16)
    sparse = torch.zeros(1, 512, 7, 7)
    sparse[:, :, ::3, ::3] = torch.randn(1, 512, 3, 3)
    full = F.linear(sparse.flatten(1), vgg16["classifier.0.weight"], vgg16["classifier.0.bias"])
    kept = F.conv2d(sparse, weights["fc6.weight"], weights["fc6.bias"], dilation=3)
    assert torch.allclose(kept.flatten(), full[0, ::4], atol=1e-4)


def test_reducedfc():
    indices = [str(i) for i in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)]
    public = convolutions(indices) | reduced_classifier("31", "33")
    weights = convert_vgg16_reducedfc(public)
    assert torch.equal(weights["features.26.weight"], public["26.weight"])
    assert torch.equal(weights["fc6.weight"], public["31.weight"])
    assert torch.equal(weights["fc7.bias"], public["33.bias"])
    assert DeepLabLargeFOV().load_state_dict(weights).missing_keys == []


def test_deeplab_largefov():
    public = convolutions(CAFFE_NAMES) | reduced_classifier("fc6", "fc7")
    public["fc8_voc12.weight"] = torch.zeros(21, 1024, 1, 1)
    weights = convert_deeplab_largefov(public)
    assert torch.equal(weights["features.0.weight"], public["conv1_1.weight"])
    assert torch.equal(weights["features.7.weight"], public["conv2_2.weight"])
    assert torch.equal(weights["features.28.bias"], public["conv5_3.bias"])
    assert torch.equal(weights["fc6.weight"], public["fc6.weight"])
    assert DeepLabLargeFOV().load_state_dict(weights).missing_keys == []


def test_wrong_files_are_named(vgg16):
    with pytest.raises(ValueError, match=r"DeepLab-LargeFOV weights: .* missing \(conv1_1.weight"):
        convert_deeplab_largefov(vgg16)
    without = {k: v for k, v in vgg16.items() if k != "classifier.3.bias"}
    with pytest.raises(ValueError, match=r"1 missing \(classifier.3.bias"):
        convert_vgg16(without)
    with pytest.raises(ValueError, match=r"classifier.0.weight has shape \(2, 2\)"):
        convert_vgg16(vgg16 | {"classifier.0.weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match=r"features.0.weight has shape"):
        convert_vgg16(vgg16 | {"features.0.weight": torch.zeros(64, 1, 3, 3)})


@pytest.mark.parametrize(
    "flags, overrides, copies",
    [([], [], 3), (["--single-network"], ["MODEL.SPOP.SCALE_AWARE", False], 2)],
)
def test_the_tool_s_file_loads_into_every_network(tmp_path, vgg16, flags, overrides, copies):
    torch.save(vgg16, tmp_path / "vgg16.pth")
    output = tmp_path / "spop.pkl"
    arguments = ["--architecture", "vgg16", *flags, str(tmp_path / "vgg16.pth"), str(output)]
    runpy.run_path(str(TOOL))["main"](arguments)
    model = build_model(make_cfg("spop_rpn_only.yaml", *overrides))
    DetectionCheckpointer(model).load(str(output))
    trunks = [n for n, m in model.named_modules() if isinstance(m, DeepLabLargeFOV)]
    expected = convert_vgg16(vgg16)
    state = model.state_dict()
    assert len(trunks) == copies
    for trunk in trunks:
        for key, value in expected.items():
            assert torch.equal(state[f"{trunk}.{key}"], value)


def test_names_of_the_copies():
    weights = spop_weights({"fc6.bias": torch.zeros(1)}, SINGLE_NETWORKS)
    assert list(weights) == [
        "proposal_generator.networks.confidence.trunk.fc6.bias",
        "proposal_generator.networks.localization.all_sizes.trunk.fc6.bias",
    ]
    assert set(LARGEFOV_CONVERTERS) == {"deeplab_largefov", "vgg16", "vgg16_reducedfc"}
