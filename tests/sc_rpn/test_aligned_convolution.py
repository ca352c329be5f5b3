"""The gather-based deformable convolution against torchvision's, and against the plain one."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import deform_conv2d

from d2proposals.sc_rpn import aligned_convolution
from d2proposals.sc_rpn.aligned_convolution import AlignedConv, gather_deform_conv2d, kernel_grid
from d2proposals.sc_rpn.point_representation import box_alignment_offset, point_alignment_offset


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (9, 13), (40, 33)])
@pytest.mark.parametrize("spread", [0.0, 0.7, 30.0])
def test_gather_equals_torchvision_in_value_and_gradient(size, spread):
    torch.manual_seed(0)
    inputs = [torch.randn(2, 6, *size), torch.randn(2, 18, *size) * spread, torch.randn(8, 6, 3, 3)]
    grad = torch.randn(2, 8, *size)
    results = []
    for function in (gather_deform_conv2d, lambda *args: deform_conv2d(*args, padding=1)):
        arguments = [x.clone().requires_grad_() for x in inputs]
        output = function(*arguments)
        results.append([output.detach(), *torch.autograd.grad(output, arguments, grad)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_value_is_the_same_without_gradients():
    torch.manual_seed(0)
    x, offset, weight = (
        torch.randn(2, 4, 45, 50),
        torch.randn(2, 18, 45, 50),
        torch.rand(5, 4, 3, 3),
    )
    with torch.no_grad():
        blocks = gather_deform_conv2d(x, offset, weight)
    weight.requires_grad_()
    torch.testing.assert_close(blocks, gather_deform_conv2d(x, offset, weight).detach())
    torch.testing.assert_close(
        blocks, deform_conv2d(x, offset, weight.detach(), padding=1), rtol=1e-4, atol=1e-4
    )


def test_blocks_do_not_change_the_result(monkeypatch):
    torch.manual_seed(0)
    x, offset, weight = torch.randn(2, 3, 8, 9), torch.randn(2, 18, 8, 9), torch.randn(4, 3, 3, 3)
    whole = gather_deform_conv2d(x, offset, weight)
    monkeypatch.setattr(aligned_convolution, "_POSITIONS_PER_BLOCK", 7)
    torch.testing.assert_close(gather_deform_conv2d(x, offset, weight), whole)


@pytest.mark.parametrize("sampler", ["torchvision", "gather"])
def test_points_on_the_kernel_give_the_plain_convolution(sampler):
    torch.manual_seed(0)
    conv = AlignedConv(in_channels=5, out_channels=6, sampler=sampler)
    x = torch.randn(2, 5, 11, 8)
    points = kernel_grid().flatten().expand(2, 11, 8, 18)
    boxes = torch.tensor([-1.0, -1.0, 1.0, 1.0]).expand(2, 11, 8, 4)
    plain = F.conv2d(x, conv.weight, padding=1)
    for offset in (point_alignment_offset(points, 0.1), box_alignment_offset(boxes), None):
        torch.testing.assert_close(conv(x, offset), plain)


def test_points_on_the_initial_grid_give_a_dilated_convolution():
    # Nine points over a square of 8 cells are 4 cells apart.
    torch.manual_seed(0)
    conv = AlignedConv(in_channels=5, out_channels=6)
    x = torch.randn(1, 5, 12, 15)
    points = kernel_grid().flatten().mul(4).expand(1, 12, 15, 18)
    torch.testing.assert_close(
        conv(x, point_alignment_offset(points, 0.1)),
        F.conv2d(x, conv.weight, padding=4, dilation=4),
        rtol=1e-4,
        atol=1e-4,
    )


def test_box_alignment_puts_taps_on_corners_sides_and_centre():
    # A box 6 wide, 12 high, centred 2 right and 1 down of the location: taps at x -1, 2, 5 and
    # y -5, 1, 7, minus the kernel's own taps -1, 0, 1; (dy, dx) row by row.
    offset = box_alignment_offset(torch.tensor([-1.0, -5.0, 5.0, 7.0]).view(1, 1, 1, 4))
    assert offset.view(9, 2).tolist() == [
        *([-4, 0], [-4, 2], [-4, 4]),
        *([1, 0], [1, 2], [1, 4]),
        *([6, 0], [6, 2], [6, 4]),
    ]


def test_box_alignment_hands_no_gradient_to_the_box():
    boxes = torch.tensor([-1.0, -5.0, 5.0, 7.0]).view(1, 1, 1, 4).requires_grad_()
    assert not box_alignment_offset(boxes).requires_grad


def test_alignment_gradient_is_scaled():
    points = torch.randn(1, 2, 2, 18, requires_grad=True)
    offset = point_alignment_offset(points, 0.1)
    offset.sum().backward()
    torch.testing.assert_close(points.grad, torch.full_like(points, 0.1))
    assert not point_alignment_offset(points, 0.0).requires_grad


def test_unknown_sampler():
    with pytest.raises(ValueError, match="DEFORM_SAMPLER 'fast', choose one of"):
        AlignedConv(in_channels=1, out_channels=1, sampler="fast")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("sampler", ["torchvision", "gather"])
def test_same_on_cuda(sampler):
    torch.manual_seed(0)
    conv = AlignedConv(in_channels=5, out_channels=6, sampler=sampler)
    x, offset = torch.randn(2, 5, 11, 8), torch.randn(2, 18, 11, 8)
    expected = conv(x, offset)
    torch.testing.assert_close(
        conv.cuda()(x.cuda(), offset.cuda()).cpu(), expected, rtol=1e-3, atol=1e-3
    )
