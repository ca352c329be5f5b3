"""SC-RPN as a traced network, on an image of another size than that of the trace."""

import warnings

import pytest
import torch
from detectron2.export import TracingAdapter
from detectron2.modeling import build_model

from tests.common import make_cfg
from tests.sc_rpn import ablation_rows as rows
from tests.sc_rpn.builders import CHANNELS


def random_image(height, width):
    generator = torch.Generator().manual_seed(height)
    return torch.randint(0, 256, (3, height, width), generator=generator).float()


def build_network(row):
    cfg = make_cfg(
        "shapes/sc_rpn_only.yaml",
        *("MODEL.FPN.OUT_CHANNELS", CHANNELS, "MODEL.SCRPN.HEAD_CHANNELS", CHANNELS),
        # Less than the largest map has at the second size, more than it has at the first.
        *("MODEL.SCRPN.PRE_NMS_TOPK_TEST", 900),
        # So few that suppression would need less than all boxes.
        *("MODEL.SCRPN.POST_NMS_TOPK_TEST", 400),
        *rows.node(rows.ROWS[row]),
    )
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    head = model.proposal_generator.head
    for layer in (head.init_offset, head.classification, head.secondary_offset):
        torch.nn.init.normal_(layer.weight, std=0.1)
    return model


@pytest.mark.parametrize("row", ["III IoU mask", "III IoU loss"])
def test_a_trace_proposes_what_the_network_does_at_another_size(row):
    model = build_network(row)
    # The second is padded, to 160 x 224.
    first, second = random_image(96, 128), random_image(150, 220)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Detectron2's and torchvision's own Python values
        adapter = TracingAdapter(model, [{"image": first}])
        traced = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
        for image in (second, first):
            found = adapter.outputs_schema(traced(image))[0]["proposals"]
            expected = model([{"image": image}])[0]["proposals"]
            assert found.image_size.tolist() == list(expected.image_size)
            torch.testing.assert_close(
                found.proposal_boxes.tensor, expected.proposal_boxes.tensor, rtol=1e-4, atol=1e-2
            )
            torch.testing.assert_close(
                found.objectness_logits, expected.objectness_logits, rtol=1e-4, atol=1e-4
            )
