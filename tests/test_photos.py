"""The configurations for photographs, as their files are but for weights from the network."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from tests.common import CONFIGS, make_cfg, make_record, precomputed

FILES = sorted(
    path.relative_to(CONFIGS).as_posix()
    for path in (CONFIGS / "photos").glob("*.yaml")
    if not path.name.startswith("Base-")
)
# With random weights SPOP's boxes have no side and DetectorNet is sure of nothing.
SURE = {"photos/detectornet_mobilenet_v2.yaml": ["MODEL.DETECTORNET.SCORE_THRESH", -1.0]}
# Models that give proposals, not detections.
PROPOSING = [file for file in FILES if make_cfg(file).MODEL.META_ARCHITECTURE == "ProposalNetwork"]
# They read pixels, so that images of one batch are apart from the start.
IMAGE_LEVEL = [f"photos/{name}_mobilenet_v2.yaml" for name in ("deepmask", "spop", "detectornet")]


def configuration(file):
    return make_cfg(file, "MODEL.TORCHVISION.WEIGHTS", "", *SURE.get(file, []))


def build(file):
    torch.manual_seed(0)
    cfg = configuration(file)
    model = build_model(cfg)
    if "spop" in file:
        for network in model.proposal_generator.networks.localization.values():
            network.offset.bias.data = torch.tensor([-20.0, -20.0, 20.0, 20.0]) / 513
    return model


@pytest.mark.parametrize("file", FILES)
def test_a_training_step_reaches_what_is_not_frozen(file):
    model = build(file).train()
    batch = [
        make_record((128, 160), [[8, 8, 70, 100], [90, 30, 150, 90]]),
        make_record((160, 128), [[20, 40, 100, 120]], seed=1),
    ]
    for record in batch:
        record |= precomputed(configuration(file), record["height"], record["width"])
    with EventStorage():
        losses = model(batch)
    sum(losses.values()).backward()
    assert losses and all(loss.isfinite() for loss in losses.values())
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert [n for n, p in trained.items() if p.grad is None] == []
    # The stem is frozen, in whichever module the trunk is; the end of the trunk is not.
    trunk = [n for n, _ in model.named_parameters() if "features.0." in n]
    assert trunk and not any(n in trained for n in trunk)
    assert any(".features." in n for n in trained)


@pytest.mark.parametrize("file", PROPOSING)
def test_proposals_are_ordered_clipped_and_limited(file):
    model = build(file).eval()
    record = make_record((96, 130), [])
    record.update(height=192, width=260)
    with torch.no_grad():
        first, second = model([record])[0]["proposals"], model([record])[0]["proposals"]
    boxes, logits = first.proposal_boxes.tensor, first.objectness_logits
    assert torch.equal(boxes, second.proposal_boxes.tensor)
    assert first.image_size == (192, 260) and 0 < len(boxes) <= 1000
    assert (logits[1:] <= logits[:-1]).all()
    assert (boxes >= 0).all() and (boxes <= boxes.new_tensor([260, 192] * 2)).all()


@pytest.mark.parametrize("file", IMAGE_LEVEL)
def test_an_image_has_the_same_proposals_alone_and_batched(file):
    model = build(file).eval()
    small, large = make_record((96, 130), []), make_record((128, 160), [], seed=1)
    with torch.no_grad():
        together, alone = model([small, large])[0]["proposals"], model([small])[0]["proposals"]
    assert len(together) == len(alone) > 0
    for name in ("proposal_boxes", "objectness_logits"):
        values = [getattr(x.get(name), "tensor", x.get(name)) for x in (together, alone)]
        assert torch.allclose(*values, atol=1e-3)
