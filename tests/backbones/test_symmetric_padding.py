"""Symmetric padding against NumPy's, and in a backbone."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from d2proposals.backbones.symmetric_padding import SymmetricConv2d, pad_symmetrically
from d2proposals.backbones.torchvision_backbone import TorchvisionBackbone


def test_the_border_cell_is_repeated():
    x = torch.tensor([[[[1.0, 2, 3, 4]]]])
    expected = torch.tensor([[[[3.0, 2, 1, 1, 2, 3, 4, 4, 3, 2]]]])
    torch.testing.assert_close(pad_symmetrically(x, 0, 3), expected)


# Narrower than the padding, too: the mirror image is mirrored.
@pytest.mark.parametrize("rows, columns", [(0, 0), (1, 1), (1, 0), (3, 3), (2, 5), (9, 4)])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (6, 4)])
def test_padding_is_numpy_s(size, rows, columns):
    x = torch.randn(2, 3, *size, requires_grad=True)
    widths = [(0, 0), (0, 0), (rows, rows), (columns, columns)]
    padded = pad_symmetrically(x, rows, columns)
    expected = np.pad(x.detach().numpy(), widths, mode="symmetric")
    assert torch.equal(padded.detach(), torch.from_numpy(expected))
    # A cell's gradient is the number of its copies.
    padded.sum().backward()
    indices = torch.arange(float(np.prod(size))).view(1, 1, *size)
    copies = np.pad(indices.numpy()[0, 0], widths[2:], mode="symmetric").astype(int).ravel()
    counts = torch.from_numpy(np.bincount(copies)).float().view(size)
    torch.testing.assert_close(x.grad, counts.expand_as(x))


def test_convolutions_that_pad_are_replaced_with_their_parameters():
    torch.manual_seed(0)
    block = nn.Sequential(
        nn.Conv2d(4, 6, (3, 5), stride=2, padding=(1, 2), groups=2), nn.ReLU(),
        nn.Sequential(nn.Conv2d(6, 2, 3, padding=2, dilation=2, bias=False)), nn.Conv2d(2, 2, 1),
    )  # fmt: skip
    state, x = block.state_dict(), torch.randn(1, 4, 9, 8)
    first, inner, last = block[0], block[2][0], block[3]
    converted = SymmetricConv2d.convert(block)
    assert converted is block and block[0].weight is first.weight and block[3] is last
    assert converted.state_dict().keys() == state.keys()

    def padded(x, rows, columns):
        widths = [(0, 0), (0, 0), (rows, rows), (columns, columns)]
        return torch.from_numpy(np.pad(x.numpy(), widths, mode="symmetric"))

    with torch.no_grad():
        y = F.relu(F.conv2d(padded(x, 1, 2), first.weight, first.bias, stride=2, groups=2))
        y = F.conv2d(padded(y, 2, 2), inner.weight, dilation=2)
        torch.testing.assert_close(block(x), F.conv2d(y, last.weight, last.bias))


def test_a_backbone_with_symmetric_padding_sees_no_border():
    torch.manual_seed(0)
    backbone = TorchvisionBackbone(
        name="resnet18", out_features=["stride8"], padding="symmetric", freeze_at=2
    ).eval()
    convolutions = [x for x in backbone.modules() if isinstance(x, nn.Conv2d)]
    padding = [x for x in convolutions if max(x.padding) > 0]
    assert padding and all(isinstance(x, SymmetricConv2d) for x in padding)
    assert not padding[0].weight.requires_grad and padding[-1].weight.requires_grad
    assert backbone.reach.context == 56
    # Of one colour, all cells are alike.
    with torch.no_grad():
        (maps,) = backbone(torch.ones(1, 3, 64, 80)).values()
    torch.testing.assert_close(maps, maps[:, :, :1, :1].expand_as(maps), atol=1e-5, rtol=1e-5)


def test_an_unknown_padding():
    with pytest.raises(ValueError, match="MODEL.TORCHVISION.PADDING must be one of"):
        TorchvisionBackbone(name="resnet18", out_features=["stride8"], padding="reflect")
