"""AlexNet equals torchvision's; its weights are converted and loaded into every network."""

import runpy
from pathlib import Path

import pytest
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from torch import nn

from d2proposals.backbones.alexnet import AlexNet
from d2proposals.backbones.alexnet_conversion import alexnet_copies, convert_alexnet
from tests.common import make_cfg

TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert_weights.py"


@pytest.fixture(scope="module")
def public():
    torch.manual_seed(0)
    return torchvision.models.alexnet().eval()


def test_full_width_equals_torchvision(public):
    trunk = AlexNet().eval()
    trunk.load_state_dict(convert_alexnet(public.state_dict()))
    images = torch.randn(2, 3, 225, 225)
    with torch.no_grad():
        # torchvision's last linear layer is its classifier's module 6.
        expected = public.avgpool(public.features(images)).flatten(1)
        expected = public.classifier[:6](expected)
        torch.testing.assert_close(trunk(images), expected)
    assert trunk.out_channels == 4096


def test_names_are_torchvision_s(public):
    names = [name for name in public.state_dict() if not name.startswith("classifier.6")]
    assert list(AlexNet(width_factor=0.1).state_dict()) == names


@pytest.mark.parametrize("size, cells", [(225, 6), (224, 6), (97, 2), (63, 1)])
def test_the_last_map(size, cells):
    trunk = AlexNet(input_size=size, width_factor=0.05)
    assert trunk.classifier[1].in_features == 16 * cells**2
    assert trunk(torch.randn(2, 3, size, size)).shape == (2, trunk.out_channels)
    assert trunk(torch.randn(0, 3, size, size)).shape == (0, trunk.out_channels)


def test_width_and_normalisation():
    trunk = AlexNet(width_factor=0.25, norm="GN")
    widths = [x.out_channels for x in trunk.features if isinstance(x, nn.Conv2d)]
    assert widths == [16, 48, 96, 64, 64] and trunk.out_channels == 1024
    convolutions = [x for x in trunk.features if isinstance(x, nn.Conv2d)]
    assert all(isinstance(x.norm, nn.GroupNorm) and x.bias is None for x in convolutions)


def test_random_weights_keep_the_scale_of_activations():
    torch.manual_seed(0)
    output = AlexNet(width_factor=0.25, dropout=0.0)(torch.randn(8, 3, 225, 225))
    assert 0.1 < output.std() < 10


def test_bad_sizes():
    with pytest.raises(ValueError, match="at least 63 pixels, got 62"):
        AlexNet(input_size=62)
    with pytest.raises(ValueError, match="WIDTH_FACTOR"):
        AlexNet(width_factor=-1)


def test_wrong_files_are_refused(public):
    state = public.state_dict()
    del state["features.0.bias"]
    with pytest.raises(ValueError, match=r"1 missing \['features.0.bias'\]"):
        convert_alexnet(state)
    with pytest.raises(ValueError, match="unexpected"):
        convert_alexnet(torchvision.models.squeezenet1_1().state_dict())
    state = public.state_dict() | {"classifier.1.weight": torch.zeros(4096, 6400)}
    with pytest.raises(ValueError, match=r"classifier.1.weight has shape \(4096, 6400\)"):
        convert_alexnet(state)
    with pytest.raises(ValueError, match="has no AlexNet"):
        alexnet_copies({}, nn.Linear(1, 1))


def test_copies_for_every_network_are_loaded(tmp_path, public):
    torch.save(public.state_dict(), tmp_path / "alexnet.pth")
    # Two networks: the class-aware detector's masks and its classifier.
    config = str(TOOL.parents[1] / "configs" / "detectornet_voc.yaml")
    output = str(tmp_path / "out.pkl")
    arguments = ["--architecture", "alexnet", "--config-file", config]
    runpy.run_path(str(TOOL))["main"]([*arguments, str(tmp_path / "alexnet.pth"), output])
    # One class: a small output layer.
    model = build_model(make_cfg("detectornet_voc.yaml", "MODEL.ROI_HEADS.NUM_CLASSES", 1))
    DetectionCheckpointer(model).load(output)
    trunks = [x for x in model.modules() if isinstance(x, AlexNet)]
    assert len(trunks) == 2
    for trunk in trunks:
        for name, value in trunk.state_dict().items():
            assert torch.equal(value, public.state_dict()[name])


def test_convolutions_keep_their_order_of_memory():
    network = AlexNet(width_factor=0.05).eval()
    network.load_state_dict({k: v.contiguous() for k, v in network.state_dict().items()})
    weights = [x.weight for x in network.features if hasattr(x, "weight")]
    assert len(weights) == 5
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in weights)
    seen = []
    network.features[0].register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    images = torch.randn(2, 3, 225, 225)
    with torch.no_grad():
        found = network(images)
        # In the other order, up to rounding the same.
        network.features.to(memory_format=torch.contiguous_format)
        expected = network.classifier(network.features(images).flatten(1))
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
