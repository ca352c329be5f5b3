"""Networks: which output belongs to which class and mask, in each of the three forms."""

import pytest
import torch
from torch import nn

from d2proposals.detectornet.network import NETWORKS, BoxMaskNetwork, CropClassifier


class Trunk(nn.Module):
    """The mean of each channel."""

    input_size, out_channels = 8, 3

    def forward(self, crops):
        return crops.mean(dim=(2, 3))


@pytest.mark.parametrize(
    "networks, num_networks, outputs", [("shared", 1, 60), ("per_mask", 5, 12),
                                        ("per_class_and_mask", 15, 4)],
)  # fmt: skip
def test_outputs_are_ordered_by_class_and_mask(networks, num_networks, outputs):
    network = BoxMaskNetwork(make_trunk=Trunk, num_classes=3, mask_size=2, networks=networks)
    assert len(network.networks) == num_networks
    assert {x.output.out_features for x in network.networks} == {outputs}
    assert len({id(x.trunk) for x in network.networks}) == num_networks
    # Biases that say what each output stands for, in the order class, mask, row, column.
    numbers = torch.arange(3 * 5 * 4.0).view(3, 5, 2, 2)
    groups = {
        "shared": [numbers],
        "per_mask": list(numbers.split(1, dim=1)),
        "per_class_and_mask": [numbers[k, m] for k in range(3) for m in range(5)],
    }[networks]
    for part, group in zip(network.networks, groups, strict=True):
        nn.init.zeros_(part.output.weight)
        part.output.bias.data = group.flatten()
    masks = network(torch.randn(2, 3, 8, 8))
    assert masks.shape == (2, 3, 5, 2, 2)
    assert torch.equal(masks, numbers.expand(2, -1, -1, -1, -1))


@pytest.mark.parametrize("networks", NETWORKS)
def test_masks_of_one_class_of_each_crop(networks):
    torch.manual_seed(0)
    network = BoxMaskNetwork(make_trunk=Trunk, num_classes=4, mask_size=2, networks=networks).eval()
    crops, classes = torch.randn(7, 3, 8, 8), torch.tensor([3, 0, 3, 1, 1, 3, 0])
    calls = []
    for index, part in enumerate(network.networks):
        nn.init.normal_(part.output.bias)
        part.register_forward_pre_hook(lambda _, x, index=index: calls.append((index, len(x[0]))))
    expected = network(crops)[torch.arange(7), classes][:, None]
    calls.clear()
    masks = network(crops, classes)
    assert masks.shape == (7, 1, 5, 2, 2)
    torch.testing.assert_close(masks, expected)
    if networks == "per_class_and_mask":
        # Five networks of a class, for its crops alone; no network of class 2.
        numbers = {0: 2, 1: 2, 3: 3}
        assert calls == [(5 * k + m, n) for k, n in numbers.items() for m in range(5)]
    else:
        assert calls == [(i, 7) for i in range(len(network.networks))]


@pytest.mark.parametrize("networks", NETWORKS)
def test_no_crops(networks):
    network = BoxMaskNetwork(make_trunk=Trunk, num_classes=2, mask_size=4, networks=networks)
    assert network(torch.zeros(0, 3, 8, 8)).shape == (0, 2, 5, 4, 4)
    classes = torch.zeros(0, dtype=torch.int64)
    assert network(torch.zeros(0, 3, 8, 8), classes).shape == (0, 1, 5, 4, 4)


def test_unknown_form():
    with pytest.raises(ValueError, match="NETWORKS 'one'"):
        BoxMaskNetwork(make_trunk=Trunk, networks="one")


def test_the_classifier_has_a_background():
    classifier = CropClassifier(Trunk(), 20)
    assert classifier(torch.randn(2, 3, 8, 8)).shape == (2, 21)
