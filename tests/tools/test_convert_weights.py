"""Conversion of public weights, on synthetic files of the public names and shapes."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from d2proposals.backbones import BNInception
from d2proposals.backbones.weight_conversion import (
    convert_bn_inception,
    mirror_weights,
    read_weights,
    write_checkpoint,
)
from d2proposals.zip_rpn.follow_up import FollowUpBlocks
from d2proposals.zip_rpn.zoom_network import ZoomNetwork
from tests.common import make_cfg

TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert_weights.py"

# (channels in, layers of the block in the public file: name, kernel, channels out). A layer
# ending in _1 or _2, and the plain 3x3, reads the layer before it; the others read the input.
ORDER = ("1x1", "3x3_reduce", "3x3", "double_3x3_reduce", "double_3x3_1", "double_3x3_2")
PUBLIC_BLOCKS = {
    "3a": (192, (64, 64, 64, 64, 96, 96, 32)),
    "3b": (256, (64, 64, 96, 64, 96, 96, 64)),
    "3c": (320, (0, 128, 160, 64, 96, 96, 0)),
    "4a": (576, (224, 64, 96, 96, 128, 128, 128)),
    "4b": (576, (192, 96, 128, 96, 128, 128, 128)),
    "4c": (576, (160, 128, 160, 128, 160, 160, 128)),
    "4d": (608, (96, 128, 192, 160, 192, 192, 128)),
    "4e": (608, (0, 128, 192, 192, 256, 256, 0)),
    "5a": (1056, (352, 192, 320, 160, 224, 224, 128)),
    "5b": (1024, (352, 192, 320, 192, 224, 224, 128)),
}


def public_layers():
    """Yield (name, channels in, kernel, channels out) of every convolution of the public file."""
    yield "conv1_7x7_s2", 3, 7, 64
    yield "conv2_3x3_reduce", 64, 1, 64
    yield "conv2_3x3", 64, 3, 192
    for block, (channels, widths) in PUBLIC_BLOCKS.items():
        previous = channels
        for layer, width in zip((*ORDER, "pool_proj"), widths, strict=True):
            if width == 0:
                continue
            chained = layer in ("3x3", "double_3x3_1", "double_3x3_2")
            kernel = 3 if chained else 1
            yield f"inception_{block}_{layer}", previous if chained else channels, kernel, width
            previous = width


def make_public_weights(*, old=False):
    """A synthetic state dict; ``old``: as in the first release, with (1, C) tensors and fc."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, channels, kernel, width in public_layers():
        scale = (2 / (channels * kernel**2)) ** 0.5
        shape = (width, channels, kernel, kernel)
        state[f"{name}.weight"] = torch.randn(shape, generator=generator) * scale
        state[f"{name}.bias"] = torch.randn(width, generator=generator) * 0.1
        norm_shape = (1, width) if old else (width,)
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            value = torch.rand(norm_shape, generator=generator)
            state[f"{name}_bn.{leaf}"] = value + 0.5 if leaf in ("weight", "running_var") else value
        if not old:
            state[f"{name}_bn.num_batches_tracked"] = torch.tensor(0)
    state["fc.weight" if old else "last_linear.weight"] = torch.zeros(1000, 1024)
    state["fc.bias" if old else "last_linear.bias"] = torch.zeros(1000)
    return state


@pytest.fixture(scope="module")
def public():
    return make_public_weights()


@pytest.fixture(scope="module")
def public_file(public, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "bn_inception.pth"
    torch.save(public, path)
    return path


def run_tool(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["convert_weights.py", *map(str, arguments)])
    runpy.run_path(str(TOOL), run_name="__main__")


def convert(monkeypatch, *arguments):
    """Run the tool for images that are not divided, so that weights stay as they are."""
    run_tool(monkeypatch, "--architecture", "bn_inception", "--pixel-std", 1, 1, 1, *arguments)


class RecordingCheckpointer(DetectionCheckpointer):
    """Keeps what did not match."""

    def _log_incompatible_keys(self, incompatible):
        self.incompatible = incompatible


def load(model, path):
    checkpointer = RecordingCheckpointer(model)
    checkpointer.load(str(path))
    return checkpointer.incompatible


class Host(nn.Module):
    """A meta-architecture, as far as names go."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone


class PyramidLike(nn.Module):
    """A network over a trunk, as far as names go."""

    def __init__(self, bottom_up):
        super().__init__()
        self.bottom_up = bottom_up


def make_zoom_network(**kwargs):
    trunk = BNInception()
    kwargs = {"attention_type": "none", "in_features": list(trunk.output_shape())} | kwargs
    return ZoomNetwork(bottom_up=trunk, **kwargs)


def assert_holds(trunk, public):
    """Spot checks by hand-written names, then every tensor by its value."""
    state = trunk.state_dict()
    for ours, theirs in {
        "conv1_7x7_s2.weight": "conv1_7x7_s2.weight",
        "conv2_3x3.norm.running_var": "conv2_3x3_bn.running_var",
        "inception_3a.conv_pool_proj.bias": "inception_3a_pool_proj.bias",
        "inception_4e.conv_double_3x3_2.norm.bias": "inception_4e_double_3x3_2_bn.bias",
        "inception_5b.conv_3x3_reduce.norm.running_mean": "inception_5b_3x3_reduce_bn.running_mean",
    }.items():
        assert torch.equal(state[ours], public[theirs].reshape(state[ours].shape)), ours
    kept = [k for k in public if "num_batches" not in k and not k.startswith(("fc", "last_"))]
    assert len(state) == len(kept)
    sums = sorted(float(value.double().sum()) for value in state.values())
    assert sums == sorted(float(public[key].double().sum()) for key in kept)


@pytest.mark.parametrize("host", [lambda m: m, Host, lambda m: Host(PyramidLike(m))])
def test_trunk_weights_fit_wherever_the_trunk_is(monkeypatch, tmp_path, public, public_file, host):
    output = tmp_path / "bn_inception.pkl"
    convert(monkeypatch, public_file, output)
    trunk = BNInception()
    incompatible = load(host(trunk), output)
    assert incompatible.missing_keys == []
    assert incompatible.unexpected_keys == []
    assert incompatible.incorrect_shapes == []
    assert_holds(trunk, public)
    assert [path.name for path in tmp_path.iterdir()] == ["bn_inception.pkl"]


def test_first_release_of_the_file(monkeypatch, tmp_path):
    public = make_public_weights(old=True)
    # The first release is a file of PyTorch's older format, too.
    torch.save(public, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    convert(monkeypatch, tmp_path / "old.pth", tmp_path / "old.pkl")
    trunk = BNInception()
    incompatible = load(trunk, tmp_path / "old.pkl")
    assert incompatible.missing_keys == incompatible.unexpected_keys == []
    assert_holds(trunk, public)


def test_converted_trunk_computes_what_the_public_layers_say(public):
    """The path through the stem, 3a's double branch and so on, by the public names."""
    trunk = BNInception(out_features=["inception_3a"]).eval()
    trunk.load_state_dict(convert_bn_inception(public), strict=False)

    def layer(x, name, **kwargs):
        x = torch.conv2d(x, public[f"{name}.weight"], public[f"{name}.bias"], **kwargs)
        norm = [public[f"{name}_bn.{k}"] for k in ("running_mean", "running_var", "weight", "bias")]
        return torch.relu(torch.batch_norm(x, norm[2], norm[3], *norm[:2], False, 0, 1e-5, False))

    def pool(x):
        return torch.max_pool2d(x, 3, 2, ceil_mode=True)

    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    x = pool(layer(image, "conv1_7x7_s2", stride=2, padding=3))
    x = pool(layer(layer(x, "conv2_3x3_reduce"), "conv2_3x3", padding=1))
    double = layer(x, "inception_3a_double_3x3_reduce")
    double = layer(double, "inception_3a_double_3x3_1", padding=1)
    double = layer(double, "inception_3a_double_3x3_2", padding=1)
    expected = torch.cat(
        [
            layer(x, "inception_3a_1x1"),
            layer(layer(x, "inception_3a_3x3_reduce"), "inception_3a_3x3", padding=1),
            double,
            layer(nn.AvgPool2d(3, 1, 1)(x), "inception_3a_pool_proj"),
        ],
        dim=1,
    )
    with torch.no_grad():
        torch.testing.assert_close(trunk(image)["inception_3a"], expected, rtol=1e-4, atol=1e-4)


def test_folded_biases_leave_the_function_unchanged(monkeypatch, tmp_path, public, public_file):
    convert(monkeypatch, "--trainable-norm", public_file, tmp_path / "bn.pkl")
    frozen = BNInception().eval()
    frozen.load_state_dict(convert_bn_inception(public))
    trainable = BNInception(norm="BN").eval()
    incompatible = load(trainable, tmp_path / "bn.pkl")
    assert incompatible.missing_keys == incompatible.unexpected_keys == []
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for expected, actual in zip(frozen(image).values(), trainable(image).values(), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def mirrored(state, block, key):
    """The tensor of a mirrored block, wherever the network keeps that."""
    names = [name for name in state if name.endswith(f"mirror_{block}.{key}")]
    assert len(names) == 1, names
    return state[names[0]]


@pytest.mark.parametrize("depths", [(2, 4, 2), (2, 2, 0)])
def test_zoom_network_with_mirrored_blocks(monkeypatch, tmp_path, public, public_file, depths):
    output = tmp_path / "zip.pkl"
    convert(monkeypatch, "--zoom-network", "--mirror-depths", *depths, public_file, output)
    model = Host(make_zoom_network(mirror_depths=depths))
    before = {key: value.clone() for key, value in model.backbone.state_dict().items()}
    incompatible = load(model, output)
    assert incompatible.unexpected_keys == []
    assert incompatible.incorrect_shapes == []
    assert_holds(model.backbone.bottom_up, public)
    state = model.backbone.state_dict()
    # 5b' reads 1,024 channels, as 5b does: all is copied, down to the normalisation.
    for leaf in ("weight", "bias", "norm.weight", "norm.bias", "norm.running_mean"):
        source = state[f"bottom_up.inception_5b.conv_1x1.{leaf}"]
        assert torch.equal(mirrored(state, "5b", f"conv_1x1.{leaf}"), source)
    # 5a' reads 1,024 channels, 5a 1,056: its first 1x1 convolutions stay as they were...
    for layer in ("conv_1x1", "conv_3x3_reduce", "conv_double_3x3_reduce", "conv_pool_proj"):
        for leaf in ("weight", "norm.running_mean"):
            kept = mirrored(state, "5a", f"{layer}.{leaf}")
            assert torch.equal(kept, mirrored(before, "5a", f"{layer}.{leaf}"))
    # ... and what follows them is copied. Likewise 4c' (608 channels, not 576).
    for block in ("5a", "4c"):
        source = state[f"bottom_up.inception_{block}.conv_3x3.weight"]
        assert torch.equal(mirrored(state, block, "conv_3x3.weight"), source)
    assert not any("bottom_up" in key for key in incompatible.missing_keys)


def test_the_paper_s_network_gets_36_of_56_mirrored_layers():
    """The others read maps of other channels than their originals, see docs/zip.md."""
    with torch.device("meta"):
        trunk = BNInception()
        network = ZoomNetwork(bottom_up=trunk, in_features=list(trunk.level_blocks))
    state = network.state_dict()
    layers, copied = (
        {key.rpartition(".norm.")[0] or key.rpartition(".")[0] for key in keys if "mirror_" in key}
        for keys in (state, mirror_weights(trunk.state_dict(), state))
    )
    assert (len(layers), len(copied)) == (56, 36)
    entries = ("conv_1x1", "conv_3x3_reduce", "conv_double_3x3_reduce", "conv_pool_proj")
    assert {tuple(layer.split("mirror_")[1].split(".")) for layer in layers - copied} == {
        (block, entry) for block in ("5a", "4c", "4b", "3b", "3a") for entry in entries
    }


def test_mirrored_layers_are_all_or_nothing(caplog):
    trunk = BNInception(width_factor=0.1)
    weights = trunk.state_dict()
    same = trunk.mirror_block("inception_3b", trunk.inception_3b.in_channels, "FrozenBN")
    other = trunk.mirror_block("inception_3a", 40, "GN")
    network = nn.ModuleDict({"path": nn.ModuleDict({"mirror_3b": same, "mirror_3a": other})})
    with caplog.at_level("INFO", logger="d2proposals.backbones.weight_conversion"):
        copies = mirror_weights(weights, network.state_dict())
    assert set(copies) == {key for key in network.state_dict() if "mirror_3b" in key}
    key = "path.mirror_3b.conv_1x1.weight"
    assert copies[key] is weights["inception_3b.conv_1x1.weight"]
    # Another normalisation: no layer of 3a' is like its original.
    assert "7 of 14 mirrored layers keep their initial weights" in caplog.text
    assert "path.mirror_3a.conv_3x3," in caplog.text


def test_mirrored_layers_of_trainable_batch_normalisation():
    trunk = BNInception(width_factor=0.1, norm="BN")
    mirror = trunk.mirror_block("inception_3b", trunk.inception_3b.in_channels, "BN")
    copies = mirror_weights(
        trunk.state_dict(), {f"mirror_3b.{k}": v for k, v in mirror.state_dict().items()}
    )
    # Seven layers of convolution weight, and normalisation weight, bias, mean and variance.
    assert len(copies) == 7 * 5


def change(public, **changes):
    """The public weights with some tensors replaced or (None) left out."""
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    return {k: v for k, v in (public | changes).items() if v is not None}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"conv2_3x3__bias": None}, r"of 414 keys 1 missing \(conv2_3x3\.bias\)"),
        ({"conv9__weight": torch.zeros(1)}, r"1 unexpected \(conv9\.weight\)"),
        (
            {"inception_3a_1x1__weight": torch.zeros(64, 3, 1, 1)},
            r"inception_3a_1x1\.weight has shape \(64, 3, 1, 1\), expected \(64, 192, 1, 1\)",
        ),
        (
            {"conv1_7x7_s2_bn__running_mean": torch.zeros(2, 64)},
            r"conv1_7x7_s2_bn\.running_mean has shape \(2, 64\), expected \(64,\)",
        ),
    ],
)
def test_wrong_contents_are_named(public, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        convert_bn_inception(change(public, **changes))
    assert "\n" not in str(error.value)


def test_many_missing_keys_are_shortened():
    with pytest.raises(ValueError, match=r"414 missing \(.*, \.\.\.\) and 1 unexpected") as error:
        convert_bn_inception({"layer1.weight": torch.zeros(1)})
    assert len(str(error.value)) < 250


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_truncated_file(tmp_path, old_format, share):
    path = tmp_path / "cut.pth"
    torch.save({"a": torch.zeros(1000)}, path, _use_new_zipfile_serialization=not old_format)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match="Cannot read .*cut.pth: cut off") as error:
        read_weights(str(path))
    assert "\n" not in str(error.value)


def test_code_in_a_file_is_not_run(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"model": nn.Linear(1, 1)}, path)
    with pytest.raises(ValueError, match="Cannot read .*no file of tensors alone"):
        read_weights(str(path))


@pytest.mark.parametrize("content", [torch.zeros(1), {"state_dict": {"a": torch.zeros(1)}}])
def test_file_without_a_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="holds no state dict"):
        read_weights(str(tmp_path / "other.pth"))


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "out.pkl"
    path.write_bytes(b"old")

    def fail(*_args, **_kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("d2proposals.backbones.weight_conversion.pickle.dump", fail)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(str(path), {"a": torch.zeros(1)}, matching_heuristics=True)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_written_file_is_detectron2s_format(tmp_path):
    path = str(tmp_path / "out.pkl")
    write_checkpoint(path, {"a": torch.arange(3.0)}, matching_heuristics=False)
    content = np.load(path, allow_pickle=True)
    assert content["__author__"] != "Caffe2" and content["matching_heuristics"] is False
    assert content["model"]["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("missing.pth", "out.pkl"), "There is no weight file missing.pth"),
        (("{input}", "out.pth"), "must be a .pkl file for Detectron2 to read it, got out.pth"),
        (("{input}", "nowhere/out.pkl"), "nowhere does not exist; create it first"),
        (("--mirror-depths", "3", "4", "2", "--zoom-network", "{input}", "out.pkl"), "asks for 3"),
    ],
)
def test_command_says_what_is_wrong_in_one_line(
    monkeypatch, tmp_path, capsys, public_file, arguments, message
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        convert(monkeypatch, *(str(a).replace("{input}", str(public_file)) for a in arguments))
    assert stop.value.code == 1
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error and "Traceback" not in error


def test_unknown_architecture(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_tool(monkeypatch, "--architecture", "resnet", "in.pth", "out.pkl")
    assert "invalid choice: 'resnet'" in capsys.readouterr().err


def test_separate_trunks_are_deepmask_s(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        convert(monkeypatch, "--separate-trunks", "in.pth", "out.pkl")
    assert "--separate-trunks goes with --architecture vgg11 only" in capsys.readouterr().err


def test_follow_up_weights_stand_beside_those_of_the_zoom_network(
    monkeypatch, tmp_path, public, public_file
):
    torch.manual_seed(0)
    resnet = torchvision.models.resnet101()
    torch.save(resnet.state_dict(), tmp_path / "resnet101.pth")
    output = tmp_path / "zip_detector.pkl"
    convert(monkeypatch, "--zoom-network", "--follow-up", tmp_path / "resnet101.pth",
            public_file, output)  # fmt: skip
    model = Host(make_zoom_network(mirror_depths=(2, 4, 2)))
    model.roi_heads = nn.Module()
    model.roi_heads.box_head = FollowUpBlocks()
    incompatible = load(model, output)
    assert incompatible.unexpected_keys == incompatible.incorrect_shapes == []
    assert not any("roi_heads" in key for key in incompatible.missing_keys)
    assert_holds(model.backbone.bottom_up, public)
    blocks = model.roi_heads.box_head
    assert torch.equal(blocks.res4[0].conv1.weight, resnet.layer3[15].conv1.weight)
    assert torch.equal(blocks.res5[2].conv3.norm.weight, resnet.layer4[2].bn3.weight)


def test_follow_up_weights_need_the_zoom_network(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        convert(monkeypatch, "--follow-up", "resnet101.pth", "in.pth", "out.pkl")
    assert "--follow-up goes with --zoom-network only" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("architecture", "flags"),
    [
        ("vgg16", ["--pixel-std", "1", "1", "1"]),
        ("vgg11", ["--trainable-norm"]),
        ("vgg16", ["--zoom-network", "--trainable-norm"]),
        ("bn_inception", ["--mirror-depths", "1", "1", "1"]),
        ("bn_inception", ["--single-network"]),
    ],
)
def test_flags_without_an_effect_are_refused(monkeypatch, capsys, architecture, flags):
    with pytest.raises(SystemExit):
        run_tool(monkeypatch, "--architecture", architecture, *flags, "in.pth", "out.pkl")
    name = [flag for flag in flags if flag.startswith("--")][-1]
    assert f"{name} goes with " in capsys.readouterr().err


def test_pixel_std_moves_into_the_first_convolution(public):
    std = (57.375, 57.12, 58.395)
    plain, divided = BNInception().eval(), BNInception().eval()
    plain.load_state_dict(convert_bn_inception(public))
    divided.load_state_dict(convert_bn_inception(public, pixel_std=std))
    images = torch.randn(1, 3, 64, 64) * 60
    expected = plain(images)["inception_5b"]
    result = divided(images / torch.tensor(std)[:, None, None])["inception_5b"]
    assert torch.allclose(result, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_tools_default_pixel_std_is_that_of_the_paper_s_configuration(
    monkeypatch, public, public_file, tmp_path
):
    output = tmp_path / "weights.pkl"
    run_tool(monkeypatch, "--architecture", "bn_inception", public_file, output)
    model = BNInception()
    load(model, output)
    std = torch.tensor(make_cfg("zip_rpn_only.yaml").MODEL.PIXEL_STD)[:, None, None]
    expected = public["conv1_7x7_s2.weight"] * std
    assert torch.allclose(model.conv1_7x7_s2.weight, expected, rtol=1e-6)
