"""Networks in files find what the models do, in images of other sizes than that of the trace."""

import json
from importlib.util import find_spec

import pytest
import torch

from d2proposals.deployment.comparison import compare_outputs
from d2proposals.deployment.exported_files import (
    contract_of,
    load_onnx,
    load_torchscript,
    write_onnx,
    write_torchscript,
)
from d2proposals.deployment.image_network import ImageNetwork, noise_image
from tests.deployment.networks import NETWORKS, small_cfg, small_network

# Smaller and larger than the trace's, one a multiple of all strides; so few cells that a level has
# less than PRE_NMS_TOPK_TEST, and more.
SIZES = ((96, 64), (107, 166))


def has_onnx():
    return find_spec("onnx") is not None and find_spec("onnxruntime") is not None


@pytest.mark.parametrize("name", NETWORKS)
def test_files_find_what_the_model_does_at_other_sizes(tmp_path, name):
    network = ImageNetwork(small_network(name))
    contract = contract_of(network, small_cfg(name))
    write_torchscript(network, tmp_path / "network.ts", contract)
    hosts = [load_torchscript(tmp_path / "network.ts")]
    if has_onnx():
        write_onnx(network, tmp_path / "network.onnx", contract)
        hosts.append(load_onnx(tmp_path / "network.onnx"))
    # An export leaves the model in evaluation mode.
    assert not any(module.training for module in network.model.modules())
    check_contract(tmp_path, contract)
    for size in SIZES:
        image = noise_image(size, seed=1)
        expected = network(image)
        # Equal scores would hide what the order is.
        assert len(expected[0]) > 10 and (expected[1].diff() < -1e-4).float().mean() > 0.6
        for host in hosts:
            found = host(image)
            assert [x.dtype for x in found] == [x.dtype for x in expected]
            differences = compare_outputs(expected, found)
            assert differences.is_equal, differences
    if not has_onnx():
        pytest.skip("TorchScript is right; without onnx and onnxruntime there is no ONNX")


def check_contract(folder, contract):
    """What each file says is what was to be written."""
    assert contract["input"]["format"] == "BGR"
    files = {"contract.json": ""}
    torch.jit.load(folder / "network.ts", _extra_files=files)
    assert json.loads(files["contract.json"]) == contract
    if has_onnx():
        import onnxruntime

        session = onnxruntime.InferenceSession(folder / "network.onnx")
        assert json.loads(session.get_modelmeta().custom_metadata_map["contract"]) == contract
        assert [x.name for x in session.get_inputs()] == ["image"]
        assert session.get_inputs()[0].shape == [3, "height", "width"]
        assert [x.name for x in session.get_outputs()] == list(contract["outputs"])


def test_a_contract_says_how_large_images_are_and_what_comes_out():
    network = ImageNetwork(small_network("Faster R-CNN, RPN"))
    contract = contract_of(network, small_cfg("Faster R-CNN, RPN"))
    sizes = contract["input"]["shorter_side"], contract["input"]["longer_side_at_most"]
    assert sizes == (256, 384)
    assert list(contract["outputs"]) == ["boxes", "scores", "classes"]
