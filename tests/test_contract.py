"""What every generator promises, in every meta-architecture that hosts one."""

import pytest
import torch
from detectron2.modeling import build_model, build_proposal_generator
from detectron2.structures import pairwise_iou
from detectron2.utils.events import EventStorage

from d2proposals.proposals.image_pyramid import resize_image, scaled_size
from d2proposals.proposals.native_size_hosts import hand_over_native_sizes
from tests.common import add_rectangle_masks, make_cfg, make_images, make_instances

# Generators that read feature maps, on a small FPN; Detectron2's own RPN is the control.
GENERATORS = {
    "RPN": ["MODEL.RPN.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"],
            "MODEL.ANCHOR_GENERATOR.SIZES", [[8], [16], [32], [64], [128]]],
    "ZIP": ["MODEL.ZIP.IN_FEATURES", ["p2", "p3", "p4", "p5"], "MODEL.ZIP.HEAD_CHANNELS", 16,
            "MODEL.ANCHOR_GENERATOR.SIZES", [[8, 12], [16, 24], [32, 48], [64, 128]]],
    "SCRPN": ["MODEL.SCRPN.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"],
              "MODEL.SCRPN.HEAD_CHANNELS", 16],
    # Image-level: a trunk of its own, whatever the backbone.
    "DeepMask": ["MODEL.VGG.STAGES", [[8], [8], [8]], "MODEL.VGG.OUT_FEATURES", ["stage3"],
                 "MODEL.DEEPMASK.PATCH_SIZE", 32, "MODEL.DEEPMASK.OBJECT_SIZE", 18,
                 "MODEL.DEEPMASK.JITTER_SHIFT", 2.0, "MODEL.DEEPMASK.NEGATIVE_SHIFT", 4.0,
                 "MODEL.DEEPMASK.MASK_CHANNELS", 8, "MODEL.DEEPMASK.CODE_DIM", 8,
                 "MODEL.DEEPMASK.MASK_SIZE", 8, "MODEL.DEEPMASK.SCORE_DIMS", (8, 8),
                 "MODEL.DEEPMASK.LOG2_SCALES", (-1.0, 0.0)],
    "SPOP": ["MODEL.SPOP.TRUNK.WIDTH_FACTOR", 0.125, "MODEL.SPOP.HEAD_CHANNELS", 16,
             "MODEL.SPOP.PRE_NMS_TOPK_TRAIN", 300],
    "DetectorNet": ["MODEL.DETECTORNET.WIDTH_FACTOR", 0.0625, "MODEL.DETECTORNET.INPUT_SIZE", 97,
                    "MODEL.DETECTORNET.MASK_SIZE", 8, "MODEL.DETECTORNET.NETWORKS", "shared",
                    "MODEL.DETECTORNET.NUM_CROPS", 8, "MODEL.DETECTORNET.SCORE_THRESH", -1.0,
                    "MODEL.DETECTORNET.MEAN_DIMENSIONS", (0.2, 0.5)],
}  # fmt: skip
IMAGE_LEVEL = ["DeepMask", "SPOP", "DetectorNet"]
HOSTS = {
    "ProposalNetwork": ["MODEL.PROPOSAL_GENERATOR.PROPOSALS_IN_TRAINING", False],
    "FasterRCNN": ["MODEL.META_ARCHITECTURE", "GeneralizedRCNN",
                   "MODEL.ROI_HEADS.NAME", "StandardROIHeads"],
    "CascadeRCNN": ["MODEL.META_ARCHITECTURE", "GeneralizedRCNN",
                    "MODEL.ROI_HEADS.NAME", "CascadeROIHeads",
                    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True],
}  # fmt: skip


@pytest.fixture(autouse=True)
def seeded():
    """The same random weights each time: some propose nothing, some tie."""
    torch.manual_seed(1)


def host_cfg(generator, host="ProposalNetwork", *overrides):
    if generator in IMAGE_LEVEL and host == "ProposalNetwork":
        overrides = ("MODEL.BACKBONE.NAME", "build_image_backbone", *overrides)
    return make_cfg(
        None,
        "MODEL.META_ARCHITECTURE", "ProposalNetwork",
        "MODEL.PROPOSAL_GENERATOR.NAME", generator,
        "MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.BACKBONE.FREEZE_AT", 0,
        "MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64,
        "MODEL.RESNETS.STEM_OUT_CHANNELS", 16, "MODEL.RESNETS.NORM", "BN",
        "MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"],
        "MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"], "MODEL.FPN.OUT_CHANNELS", 32,
        "MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4", "p5"], "MODEL.ROI_HEADS.NUM_CLASSES", 3,
        "MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NUM_FC", 1,
        "MODEL.ROI_BOX_HEAD.FC_DIM", 16, "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 3,
        *GENERATORS[generator], *HOSTS[host], *overrides,
    )  # fmt: skip


def make_batch(*boxes_of_images):
    sizes = [(75, 100), (128, 96), (64, 130)]
    torch.manual_seed(0)
    return [
        {
            "image": torch.randint(0, 256, (3, *size)).float(),
            "instances": add_rectangle_masks(make_instances(size, boxes)),
            "height": 2 * size[0],
            "width": 2 * size[1],
        }
        for size, boxes in zip(sizes, boxes_of_images, strict=False)
    ]


BOXES = [[5, 5, 40, 60], [50, 20, 90, 52]]


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("generator", GENERATORS)
def test_a_training_step_reaches_every_trainable_parameter(generator, host):
    model = build_model(host_cfg(generator, host)).train()
    with EventStorage():
        losses = model(make_batch(BOXES, BOXES[:1]))
    if generator != "RPN":
        name = generator.lower()
        assert [key for key in losses if key.startswith(f"loss_{name}_")]
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize("boxes", [([], []), (BOXES, []), ([[3, 3, 4, 4]], [[-20, -20, 300, 300]])])
def test_training_survives_images_without_and_with_strange_objects(generator, host, boxes):
    model = build_model(host_cfg(generator, host)).train()
    with EventStorage():
        losses = model(make_batch(*boxes))
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("generator", GENERATORS)
def test_evaluation_runs_and_is_deterministic(generator, host):
    model = build_model(host_cfg(generator, host)).eval()
    batch = make_batch(BOXES, [], BOXES)
    with torch.no_grad():
        first, second = model(batch), model(batch)
    field = "proposals" if host == "ProposalNetwork" else "instances"
    for a, b, x in zip(first, second, batch, strict=True):
        assert a[field].image_size == (x["height"], x["width"])
        for name, value in a[field].get_fields().items():
            other = b[field].get(name)
            value, other = (getattr(v, "patches", v) for v in (value, other))
            value, other = (getattr(v, "tensor", v) for v in (value, other))
            assert torch.equal(value, other)


@pytest.mark.parametrize("generator", GENERATORS)
def test_proposals_have_the_two_fields_in_order_clipped_and_limited(generator):
    model = build_model(host_cfg(generator)).eval()
    with torch.no_grad():
        outputs = model(make_batch(BOXES, BOXES, BOXES))
    for output in outputs:
        proposals = output["proposals"]
        with_masks = {"proposal_masks"} if generator == "DeepMask" else set()
        assert set(proposals.get_fields()) == {"proposal_boxes", "objectness_logits"} | with_masks
        boxes, logits = proposals.proposal_boxes.tensor, proposals.objectness_logits
        height, width = proposals.image_size
        assert 0 < len(boxes) <= 1000
        assert boxes.isfinite().all() and logits.isfinite().all()
        assert (logits[1:] <= logits[:-1]).all()
        assert (boxes >= 0).all() and (boxes <= boxes.new_tensor([width, height] * 2)).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()


@pytest.mark.parametrize("generator", [name for name in GENERATORS if name != "RPN"])
def test_proposals_of_an_image_do_not_depend_on_the_padding_of_its_batch(generator):
    cfg = host_cfg(generator)
    model = build_model(cfg).eval()
    images = make_images((64, 96), (128, 160), divisibility=32)
    alone = make_images((64, 96), divisibility=32)
    torch.manual_seed(0)
    shapes = model.backbone.output_shape()
    # Large values, so that untrained scores differ by more than rounding.
    features = {
        n: 30 * torch.randn(2, s.channels, -(-128 // s.stride), -(-160 // s.stride))
        for n, s in shapes.items()
    }
    alone_features = {
        n: x[:1, :, : -(-64 // shapes[n].stride), : -(-96 // shapes[n].stride)]
        for n, x in features.items()
    }
    with torch.no_grad():
        (first, _), _ = model.proposal_generator(images, features)
        (only,), _ = model.proposal_generator(alone, alone_features)
    assert torch.allclose(first.proposal_boxes.tensor, only.proposal_boxes.tensor, atol=1e-4)
    assert torch.allclose(first.objectness_logits, only.objectness_logits, atol=1e-5)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("generator", GENERATORS)
def test_state_dict_round_trip(generator, host):
    # Detections of any score: with random weights there are no others.
    cfg = host_cfg(generator, host, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)
    model, other = build_model(cfg).eval(), build_model(cfg).eval()
    other.load_state_dict(model.state_dict())
    field, boxes, scores = ("instances", "pred_boxes", "scores")
    if host == "ProposalNetwork":
        field, boxes, scores = ("proposals", "proposal_boxes", "objectness_logits")
    with torch.no_grad():
        a, b = (m(make_batch(BOXES))[0][field] for m in (model, other))
    assert len(a) > 0 and torch.equal(a.get(boxes).tensor, b.get(boxes).tensor)
    assert torch.equal(a.get(scores), b.get(scores))


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("generator", GENERATORS)
def test_explicit_constructor_equals_from_config(generator, host):
    cfg = host_cfg(generator, host)
    model = build_model(cfg)
    shapes = model.backbone.output_shape()
    from_config = build_proposal_generator(cfg, shapes).eval()
    generator_class = type(from_config)
    explicit = generator_class(**generator_class.from_config(cfg, shapes)).eval()
    explicit.load_state_dict(from_config.state_dict())
    images = make_images((64, 96))
    torch.manual_seed(0)
    features = {
        n: torch.randn(1, s.channels, -(-64 // s.stride), -(-96 // s.stride))
        for n, s in shapes.items()
    }
    with torch.no_grad():
        (a,), _ = from_config(images, features)
        (b,), _ = explicit(images, features)
    assert torch.equal(a.proposal_boxes.tensor, b.proposal_boxes.tensor)
    assert torch.equal(a.objectness_logits, b.objectness_logits)


def test_zip_from_pixels_does_not_depend_on_the_padding_of_its_batch():
    # Group normalisation takes statistics over the whole map: the padding must not be in them.
    torch.manual_seed(0)
    model = build_model(make_cfg("shapes/zip_rpn_only.yaml")).eval()
    for parameter in model.proposal_generator.heads.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    small, large = torch.rand(3, 75, 100) * 255, torch.rand(3, 128, 160) * 255
    with torch.no_grad():
        together, alone = model([{"image": small}, {"image": large}]), model([{"image": small}])
    together, alone = together[0]["proposals"][:50], alone[0]["proposals"][:50]
    assert torch.allclose(together.proposal_boxes.tensor, alone.proposal_boxes.tensor, atol=1e-2)
    assert torch.allclose(together.objectness_logits, alone.objectness_logits, atol=1e-3)


@pytest.mark.parametrize("factor", [1.25, 2.0])
def test_proposals_of_an_image_do_not_depend_on_the_resize_of_its_host(factor):
    model = hand_over_native_sizes(build_model(host_cfg("DeepMask"))).eval()
    # Smooth, so that the resize loses nothing.
    size = (96, 120)
    image = resize_image(255 * torch.rand(3, 6, 8), size)
    resized = resize_image(image, scaled_size(size, factor))
    with torch.no_grad():
        native, enlarged = (
            model([{"image": x, "height": 96, "width": 120}])[0]["proposals"]
            for x in (image, resized)
        )
    assert enlarged.image_size == size and len(native) > 20
    best = pairwise_iou(native.proposal_boxes[:20], enlarged.proposal_boxes).amax(dim=1)
    assert (best > 0.9).all()


@pytest.mark.parametrize("name", ["ZIP", "SCRPN"])
def test_a_feature_map_that_is_not_there_is_named(name):
    model = build_model(host_cfg(name)).eval()
    generator = model.proposal_generator
    generator.in_features = ["p9", *generator.in_features[1:]]
    with pytest.raises(ValueError, match="needs the feature maps p9 .*and the backbone has p2"):
        model([{"image": torch.zeros(3, 64, 64), "height": 64, "width": 64}])
