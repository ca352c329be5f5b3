"""ResNet-101's weights in the follow-up blocks of ZIP's detector, on random public files."""

import pickle
import re

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet

from d2proposals.backbones.follow_up_conversion import convert_follow_up, read_resnet_weights
from d2proposals.zip_rpn.follow_up import FollowUpBlocks


def make_resnet(layers=(3, 4, 23, 3)):
    """torchvision's ResNet-101 with random weights and statistics, 1/8 of its channels."""
    torch.manual_seed(0)
    network = ResNet(Bottleneck, list(layers))
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Conv2d):
            parent = network.get_submodule(name.rpartition(".")[0]) if "." in name else network
            narrow = nn.Conv2d(
                3 if module.in_channels == 3 else module.in_channels // 8,
                module.out_channels // 8, module.kernel_size, module.stride, module.padding,
                bias=False,
            )  # fmt: skip
            setattr(parent, name.rpartition(".")[2], narrow)
        if isinstance(module, nn.BatchNorm2d):
            parent = network.get_submodule(name.rpartition(".")[0]) if "." in name else network
            norm = nn.BatchNorm2d(module.num_features // 8)
            for tensor in (norm.weight.data, norm.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (norm.bias.data, norm.running_mean):
                tensor.normal_(std=0.1)
            setattr(parent, name.rpartition(".")[2], norm)
    return network.eval()


@pytest.fixture(scope="module")
def resnet():
    return make_resnet()


def make_blocks(**kwargs):
    return FollowUpBlocks(**{"channels": 128, **kwargs}).eval()


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_blocks_compute_what_torchvisions_compute(resnet, norm):
    blocks = make_blocks(norm=norm)
    weights = convert_follow_up(resnet.state_dict(), blocks.state_dict())
    incompatible = blocks.load_state_dict(weights, strict=False)
    assert incompatible.unexpected_keys == []
    assert [k for k in incompatible.missing_keys if "num_batches" not in k] == []
    x = torch.rand(2, 128, 7, 7)
    # res4a is layer3[0], so res4b15 is layer3[15].
    expected, y = [], x
    for block in [*resnet.layer3[15:21], *resnet.layer4]:
        y = block(y)
        expected.append(y.mean(dim=(2, 3)))
    with torch.no_grad():
        result = blocks.block_features(x)
        torch.testing.assert_close(result, torch.cat(expected, 1), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(blocks(x), expected[-1], rtol=1e-4, atol=1e-4)


def test_fewer_blocks_end_with_the_same(resnet):
    blocks = make_blocks(num_res4_blocks=2, num_res5_blocks=1)
    weights = convert_follow_up(resnet.state_dict(), blocks.state_dict())
    public = resnet.state_dict()
    assert torch.equal(weights["res4.0.conv1.weight"], public["layer3.19.conv1.weight"])
    assert torch.equal(weights["res4.1.conv3.weight"], public["layer3.20.conv3.weight"])
    assert torch.equal(weights["res5.0.shortcut.weight"], public["layer4.0.downsample.0.weight"])


def detectron2_names(state):
    """Detectron2's names, by a table."""
    table = {"bn1": "conv1.norm", "bn2": "conv2.norm", "bn3": "conv3.norm",
             "downsample.0": "shortcut", "downsample.1": "shortcut.norm"}  # fmt: skip
    renamed = {}
    for name, value in state.items():
        if match := re.match(r"layer(\d)\.(\d+)\.(\w+(?:\.\d)?)\.(\w+)$", name):
            stage, index, layer, leaf = match.groups()
            renamed[f"res{int(stage) + 1}.{index}.{table.get(layer, layer)}.{leaf}"] = value
    return renamed


def caffe2_names(state):
    """Caffe2's names; statistics are folded into scale and shift, as in MSRA's file."""
    table = {"conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c", "shortcut": "branch1"}
    renamed = {"conv1_w": state["conv1.weight"]}
    for name, value in detectron2_names(state).items():
        stage, index, layer, *leaf = name.split(".")
        prefix = f"{stage}_{index}_{table[layer]}"
        if leaf == ["weight"]:
            renamed[f"{prefix}_w"] = value
        elif leaf == ["norm", "weight"]:
            norm = f"{stage}.{index}.{layer}.norm."
            source = detectron2_names(state)
            scale = value / (source[norm + "running_var"] + 1e-5).sqrt()
            renamed[f"{prefix}_bn_s"] = scale
            renamed[f"{prefix}_bn_b"] = (
                source[norm + "bias"] - source[norm + "running_mean"] * scale
            )
    return renamed


@pytest.mark.parametrize("naming", [detectron2_names, caffe2_names])
@pytest.mark.parametrize("root", ["model", "blobs", None])
def test_pickles_of_detectron2(resnet, tmp_path, naming, root):
    arrays = {k: v.detach().numpy() for k, v in naming(resnet.state_dict()).items()}
    path = tmp_path / "R-101.pkl"
    path.write_bytes(pickle.dumps({root: arrays, "__author__": "Caffe2"} if root else arrays))
    blocks, expected = make_blocks(), make_blocks()
    weights = convert_follow_up(read_resnet_weights(str(path)), blocks.state_dict())
    blocks.load_state_dict(weights)
    expected.load_state_dict(convert_follow_up(resnet.state_dict(), expected.state_dict()))
    x = torch.rand(1, 128, 7, 7)
    with torch.no_grad():
        torch.testing.assert_close(blocks(x), expected(x), rtol=1e-3, atol=1e-3)


def test_stride_in_1x1_is_msras():
    torchvisions, msras = make_blocks(), make_blocks(stride_in_1x1=True)
    for blocks, strides in ((torchvisions, [1, 2]), (msras, [2, 1])):
        block = blocks.res5[0]
        assert [block.conv1.stride[0], block.conv2.stride[0]] == strides


@pytest.mark.parametrize("layers, number", [((3, 4, 6, 3), 6), ((3, 8, 36, 3), 36)])
def test_other_resnets_are_refused(layers, number):
    state = make_resnet(layers).state_dict()
    with pytest.raises(ValueError, match=f"res4 has {number} blocks, expected 23") as error:
        convert_follow_up(state, make_blocks().state_dict())
    assert "\n" not in str(error.value)


def test_wrong_weights_are_named(resnet):
    state, blocks = resnet.state_dict(), make_blocks().state_dict()
    del state["layer4.1.conv2.weight"]
    with pytest.raises(ValueError, match=r"1 missing \(res5\.1\.conv2\.weight\)"):
        convert_follow_up(state, blocks)
    # A lost shift is not made up, unlike the statistics.
    state = resnet.state_dict()
    del state["layer4.1.bn2.bias"]
    with pytest.raises(ValueError, match=r"1 missing \(res5\.1\.conv2\.norm\.bias\)"):
        convert_follow_up(state, blocks)
    with pytest.raises(
        ValueError, match=r"res4\.15\.conv1\.weight has shape \(32, 128, 1, 1\), exp"
    ):
        convert_follow_up(resnet.state_dict(), make_blocks(channels=64).state_dict())


class Hostile:
    def __reduce__(self):
        return print, ("ran",)


def test_code_in_a_pickle_is_not_run(tmp_path, capsys):
    path = tmp_path / "R-101.pkl"
    path.write_bytes(pickle.dumps({"model": {"res4_0_branch2a_w": Hostile()}}))
    with pytest.raises(ValueError, match="could run code"):
        read_resnet_weights(str(path))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", [[1], {"model": {"lr": 0.1}}, {"model": np.zeros(3)}])
def test_pickle_without_weights(tmp_path, content):
    path = tmp_path / "R-101.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match="holds no weights by name"):
        read_resnet_weights(str(path))


def test_missing_file():
    with pytest.raises(FileNotFoundError, match="no weight file nowhere.pkl"):
        read_resnet_weights("nowhere.pkl")
