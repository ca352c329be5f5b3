"""Both stages at the samples alone: losses and gradients of those computed everywhere."""

import pytest
import torch
from detectron2.utils.events import EventStorage

from d2proposals.sc_rpn.aligned_convolution import AlignedConv
from d2proposals.sc_rpn.generator import SCRPN
from d2proposals.sc_rpn.head import SCRPNHead
from tests.sc_rpn import ablation_rows as rows
from tests.sc_rpn.builders import BOXES, build_generator, make_batch


def widen(head):
    """Weights with which the points are somewhere else at each cell, and all maps matter."""
    for layer in (head.init_offset, head.secondary_offset, head.classification, head.iou_mask):
        torch.nn.init.normal_(layer.weight, std=0.1)
        torch.nn.init.normal_(layer.bias, std=0.1)


def losses_and_gradients(generator, batch):
    """Of one training step, from the same random negatives each time."""
    images, features, gt_instances = batch
    features = {name: x.clone().requires_grad_() for name, x in features.items()}
    generator.zero_grad()
    torch.manual_seed(7)
    with EventStorage():
        _, losses = generator.train()(images, features, gt_instances)
    sum(losses.values()).backward()
    gradients = {f"d {name}": p.grad.clone() for name, p in generator.named_parameters()}
    gradients |= {f"d {name}": x.grad for name, x in features.items()}
    return losses, gradients


def dense_at(head, initial, is_needed):
    """The twin of SCRPNHead.predict_refined_at."""
    return head.predict_refined(initial).at(is_needed)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "IOU_MASK.FEATURE fused; NUM_CONVS 1; ALIGNMENT_GRADIENT 1.0",
        "IOU_MASK.FEATURE cls; DEFORM_SAMPLER torchvision",
        "IOU_MASK.SAMPLES regression; " + rows.BOX + "ALIGNMENT box",
        rows.SMOOTH_L1 + rows.BOX + "ALIGNMENT none",
        # Two anchors a location.
        rows.SMOOTH_L1
        + rows.BOX
        + rows.WITHOUT_SADS
        + "ALIGNMENT none; ANCHOR_ASPECT_RATIOS (1.0,2.0)",
    ],
    ids=["defaults", "fused", "torchvision", "box", "none", "anchors"],
)
@pytest.mark.parametrize("boxes", [(BOXES, BOXES[:1]), ([], BOXES[:1])], ids=["objects", "half"])
def test_losses_and_gradients_are_those_of_the_dense_stage(monkeypatch, text, boxes):
    generator = build_generator(rows.node(text + "; BATCH_SIZE_PER_IMAGE 40"))
    widen(generator.head)
    batch = make_batch(boxes=boxes)
    found = losses_and_gradients(generator, batch)
    assert generator._learns_at_samples(torch.device("cpu"))
    monkeypatch.setattr(SCRPNHead, "predict_refined_at", dense_at)
    monkeypatch.setattr(SCRPN, "_learns_at_samples", lambda *_: False)
    expected = losses_and_gradients(generator, batch)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for name, gradient in found[1].items():
        assert gradient.any() or name.startswith("d p"), name


def test_all_negatives_of_the_iou_mask_are_read(monkeypatch):
    """Table VI's "regression samples and all negative samples": nothing is left out."""
    generator = build_generator(rows.node("IOU_MASK.SAMPLES regression_and_negatives"))
    read = []
    loss = generator.stage_losses.iou_mask_loss

    def count(iou_mask, *arguments):
        read.append(len(iou_mask))
        return loss(iou_mask, *arguments)

    monkeypatch.setattr(generator.stage_losses, "iou_mask_loss", count)
    losses_and_gradients(generator, make_batch(((64, 64),), (BOXES[:1],)))
    assert read == [16 * 16 + 8 * 8 + 4 * 4 + 2 * 2 + 1]


@pytest.mark.parametrize("wanted", [False, True])
def test_maps_are_convolved_at_the_samples_alone(monkeypatch, wanted):
    """Whole maps only to propose, and then without gradient."""
    convolved = {True: [], False: []}  # numbers of positions with and without gradient
    forward_at = AlignedConv.forward_at

    def count(self, maps, offset, positions, *args):
        convolved[torch.is_grad_enabled()].append(len(positions))
        return forward_at(self, maps, offset, positions, *args)

    monkeypatch.setattr(AlignedConv, "forward_at", count)
    monkeypatch.setattr(AlignedConv, "forward", None)
    text = "BATCH_SIZE_PER_IMAGE 40"
    generator = build_generator(
        [*rows.node(text), "MODEL.PROPOSAL_GENERATOR.PROPOSALS_IN_TRAINING", wanted]
    )
    losses_and_gradients(generator, make_batch())
    assert 2 * 40 <= sum(convolved[True]) < 2 * 60
    cells = [32 * 40, 16 * 20, 8 * 10, 4 * 5, 2 * 3]
    assert convolved[False] == [2 * number for number in cells] * wanted


@pytest.mark.parametrize("sampler", ["torchvision", "gather"])
@pytest.mark.parametrize("has_offset", [True, False])
def test_convolution_at_positions(sampler, has_offset):
    torch.manual_seed(0)
    conv = AlignedConv(in_channels=5, out_channels=6, sampler=sampler)
    x = torch.randn(2, 5, 7, 4)
    offset = torch.randn(2, 18, 7, 4) * 3 if has_offset else None
    # None, the first of both images, the last of all, in any order.
    for positions in ([], [0], [28], [55, 3, 30, 3]):
        at = torch.tensor(positions, dtype=torch.int64)
        rows_at = offset.permute(0, 2, 3, 1).reshape(56, 18)[at] if has_offset else None
        expected = conv(x, offset).permute(0, 2, 3, 1).reshape(56, 6)[at]
        found = conv.forward_at([x], rows_at, at)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_convolution_at_positions_of_several_maps():
    """Values and gradients are those of each map alone, in any order of the positions."""
    torch.manual_seed(0)
    conv = AlignedConv(in_channels=5, out_channels=6, sampler="gather")
    sizes = [(8, 6), (4, 3), (1, 2)]  # 48 + 12 + 2 cells of an image
    maps = [torch.randn(2, 5, *size, requires_grad=True) for size in sizes]
    # Of an image the first and last cells of each map, then some in disorder.
    at = torch.tensor([0, 47, 48, 59, 60, 61, 62, 109, 110, 121, 122, 123, 75, 3, 60, 115])
    offset = 3 * torch.randn(124, 18)
    found = conv.forward_at(maps, offset[at], at)
    image_offset, whole = offset.view(2, 62, 18), []
    for x, start in zip(maps, (0, 48, 60), strict=True):
        cells = x.shape[-2] * x.shape[-1]
        own = image_offset[:, start : start + cells].permute(0, 2, 1).unflatten(2, x.shape[-2:])
        whole.append(conv(x, own).flatten(2).transpose(1, 2))
    expected = torch.cat(whole, dim=1).flatten(0, 1)[at]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    weight = torch.randn(6)
    gradients = [
        torch.autograd.grad((rows * weight).sum(), [*maps, conv.weight])
        for rows in (found, expected)
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("at_positions", [False, True])
def test_points_are_sampled_in_float32_and_multiplied_under_autocast(at_positions):
    """bfloat16 has 8 digits: sampled with it, a point 200.25 cells away would be off by a cell."""
    torch.manual_seed(0)
    conv = AlignedConv(in_channels=3, out_channels=4, sampler="gather")
    x = torch.arange(260.0).expand(1, 3, 1, 260)
    offset = torch.zeros(1, 18, 1, 260)
    offset[:, 1::2] = 0.25
    if at_positions:
        arguments = ([x], offset[..., 200:201].flatten(1), torch.tensor([200]))
        run = conv.forward_at
    else:
        arguments, run = (x, offset), conv
    expected = run(*arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(*arguments)
    assert expected.dtype == torch.float32 and found.dtype == torch.bfloat16
    weight = conv.weight.detach().bfloat16().float()
    # The middle row of taps: at 199.25, 200.25 and 201.25, rounded to bfloat16's 8 digits.
    samples = torch.tensor([199.25, 200.25, 201.25]).bfloat16().float()
    by_hand = (weight[:, :, 1] * samples).sum(dim=(1, 2))
    one = found[0] if at_positions else found[0, :, 0, 200]
    torch.testing.assert_close(one.float(), by_hand, rtol=1e-2, atol=1e-2)
