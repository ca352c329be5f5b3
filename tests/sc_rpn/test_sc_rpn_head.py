"""The head of SC-RPN: which map predicts the IoU mask, and the padding of a batch."""

import pytest
import torch

from tests.sc_rpn import ablation_rows as rows
from tests.sc_rpn.builders import CHANNELS, STRIDES, build_generator, make_batch


def predict_mask(feature, zeroed=slice(0, 0)):
    """IoU mask of one feature map; outputs ``zeroed`` of the aligned convolution are zero."""
    head = build_generator(rows.node(f"IOU_MASK.FEATURE {feature}")).head
    torch.nn.init.normal_(head.iou_mask.weight)
    torch.nn.init.constant_(head.iou_mask.bias, 3.0)
    with torch.no_grad():
        head.aligned_conv.weight[zeroed] = 0
        x = torch.randn(1, CHANNELS, 4, 5, generator=torch.Generator().manual_seed(2))
        return head([x], [torch.ones(1, 1, 4, 5)]).iou_mask


def test_iou_mask_is_predicted_from_the_named_map():
    # The first half of the aligned convolution is the classification map, the second the
    # regression map; a map of zeros predicts the bias.
    cls_map, reg_map = slice(0, CHANNELS), slice(CHANNELS, None)
    constant = torch.full((1, 20), 3.0)
    assert torch.equal(predict_mask("cls", cls_map), constant)
    assert torch.equal(predict_mask("reg", reg_map), constant)
    from_cls, from_reg = predict_mask("cls", reg_map), predict_mask("reg", cls_map)
    assert from_cls.std() > 1e-3 and from_reg.std() > 1e-3
    # The fused map is the sum of both, and the prediction is linear in it.
    torch.testing.assert_close(predict_mask("fused"), from_cls + from_reg - 3)


@pytest.mark.parametrize(
    "overrides",
    [
        "NUM_CONVS 0",
        "NUM_CONVS 2",
        "NUM_CONVS 1; " + rows.ROWS["III baseline"],
        "NUM_CONVS 1; " + rows.ROWS["III alignment"],
    ],
)
def test_padding_of_a_batch_does_not_reach_the_images(overrides):
    head = build_generator(rows.node(overrides)).head
    for name, parameter in head.named_parameters():
        if name.endswith("bias") and not name.startswith("init_offset"):
            torch.nn.init.constant_(parameter, 0.5)  # zeros would stay zero
    images, features, _ = make_batch()
    height, width = images.image_sizes[1]
    sizes = [(-(-height // s), -(-width // s)) for s in STRIDES]
    alone, batch, valid = [], [], []
    for x, (rows_inside, columns_inside) in zip(features.values(), sizes, strict=True):
        is_inside = torch.zeros(1, 1, *x.shape[-2:])
        is_inside[..., :rows_inside, :columns_inside] = 1
        alone.append(x[1:, :, :rows_inside, :columns_inside])
        batch.append(torch.where(is_inside > 0, x[1:], 50.0))
        valid.append(is_inside)
    with torch.no_grad():
        expected = head(alone, [torch.ones_like(x[:, :1]) for x in alone])
        found = head(batch, valid)
    is_inside = torch.cat([v.flatten() for v in valid]).bool()
    assert not is_inside.all()
    for name, value in vars(expected).items():
        if value is not None:
            in_batch = getattr(found, name).unflatten(1, (len(is_inside), -1))[:, is_inside]
            torch.testing.assert_close(in_batch.flatten(1, 2), value, msg=name)


@pytest.mark.parametrize("row", ["III one anchor", "III IoU mask"])
@pytest.mark.parametrize("prior_prob", [0.5, 0.04])
def test_the_classification_begins_with_its_prior_probability(row, prior_prob):
    head = build_generator(rows.node(f"{rows.ROWS[row]}; PRIOR_PROB {prior_prob}")).head
    x = torch.zeros(1, CHANNELS, 2, 3)
    predictions = head([x], [None])
    torch.testing.assert_close(
        predictions.class_logits.sigmoid(), torch.full((1, 6), float(prior_prob))
    )
    if predictions.iou_mask is not None:
        assert not predictions.iou_mask.any()


@pytest.mark.parametrize("prior_prob", [0.0, 1.0])
def test_a_prior_probability_is_between_none_and_certainty(prior_prob):
    with pytest.raises(ValueError, match=r"MODEL\.SCRPN\.PRIOR_PROB must be between 0 and 1"):
        build_generator(rows.node(f"PRIOR_PROB {prior_prob}"))
