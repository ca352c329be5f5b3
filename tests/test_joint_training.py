"""Generators that are trained within a detector: how their proposals come about in training."""

import copy

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn

from d2proposals.deepmask import generator as deepmask_generator
from d2proposals.deepmask import image_canvas
from d2proposals.proposals.native_size_hosts import hand_over_native_sizes
from d2proposals.spop import generator as spop_generator
from d2proposals.spop import pixel_networks
from tests.common import add_rectangle_masks, make_instances
from tests.test_contract import BOXES, GENERATORS, IMAGE_LEVEL, host_cfg, make_batch

# Layers that behave differently in training, in the generators that can have them.
WITH_BN = {
    "DeepMask": ("MODEL.VGG.NORM", "BN", "MODEL.DEEPMASK.BRANCHES", "joint"),
    "SPOP": ("MODEL.SPOP.TRUNK.NORM", "BN"),
    "DetectorNet": ("MODEL.DETECTORNET.NORM", "BN"),
}
MODAL = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)


def build_detector(generator, host="FasterRCNN", *overrides):
    torch.manual_seed(0)
    return build_model(host_cfg(generator, host, *overrides)).train()


def training_step(model, batch=None):
    """One forward pass; the proposals that the heads were given, and the losses."""
    seen = []
    hook = model.proposal_generator.register_forward_hook(lambda *args: seen.append(args[2][0]))
    torch.manual_seed(1)
    with EventStorage():
        losses = model(batch or make_batch(BOXES, BOXES[:1]))
    hook.remove()
    return seen[0], losses


def calls_of_layers(generator):
    """A list that fills with (gradient enabled, training mode, layer) of each layer's call."""
    calls = []

    def note(layer, args):
        calls.append((torch.is_grad_enabled(), layer.training, layer))

    for layer in generator.modules():
        # Not the layers that only prepare pixels, which the sampling of crops uses as well.
        if isinstance(layer, MODAL) or list(layer.parameters(recurse=False)):
            layer.register_forward_pre_hook(note)
    return calls


@pytest.mark.parametrize("host", ["FasterRCNN", "CascadeRCNN"])
@pytest.mark.parametrize("generator", GENERATORS)
def test_proposals_have_no_graph_and_two_fields(generator, host):
    model = build_detector(generator, host)
    proposals, losses = training_step(model)
    for proposals_i in proposals:
        assert set(proposals_i.get_fields()) == {"proposal_boxes", "objectness_logits"}
        assert len(proposals_i) > 0
        assert not proposals_i.proposal_boxes.tensor.requires_grad
        assert not proposals_i.objectness_logits.requires_grad
    name = "rpn" if generator == "RPN" else generator.lower()
    assert any(key.startswith(f"loss_{name}") for key in losses)
    # Losses of the heads alone: nothing reaches a generator that reads the images.
    heads = [loss for key, loss in losses.items() if name not in key]
    sum(heads).backward()
    touched = [n for n, p in model.proposal_generator.named_parameters() if p.grad is not None]
    assert touched == []


@pytest.mark.parametrize("generator", IMAGE_LEVEL)
def test_the_pass_for_proposals_is_an_evaluation_without_gradient(generator):
    model = build_detector(generator, "FasterRCNN", *WITH_BN[generator])
    calls = calls_of_layers(model.proposal_generator)
    training_step(model)
    layers = {type(layer) for _, _, layer in calls}
    assert any(issubclass(layer, MODAL) for layer in layers)
    # Losses first, in training mode and with a gradient, then proposals.
    modes = [(has_grad, training) for has_grad, training, layer in calls]
    assert set(modes) == {(True, True), (False, False)}
    first = modes.index((False, False))
    assert set(modes[:first]) == {(True, True)} and set(modes[first:]) == {(False, False)}
    # And the generator goes on training.
    assert all(module.training for module in model.proposal_generator.modules())


@pytest.mark.parametrize("generator", IMAGE_LEVEL)
def test_the_pass_for_proposals_leaves_batch_statistics(generator):
    model = build_detector(generator, "FasterRCNN", *WITH_BN[generator]).proposal_generator
    without = copy.deepcopy(model)
    without.proposals_in_training = False
    before = {name: value.clone() for name, value in model.state_dict().items()}
    detector = build_detector(generator, "FasterRCNN", *WITH_BN[generator])
    batch = make_batch(BOXES, BOXES[:1])
    images = detector.preprocess_image(batch)
    losses = []
    for module in (model, without):
        torch.manual_seed(1)
        with EventStorage():
            losses.append(module(images, {}, [x["instances"] for x in batch])[1])
    assert losses[0].keys() == losses[1].keys()
    assert all(torch.equal(losses[0][name], losses[1][name]) for name in losses[0])
    statistics = [name for name in before if name.endswith("running_mean")]
    # Training itself moves them.
    assert any(not torch.equal(before[name], model.state_dict()[name]) for name in statistics)
    for name, value in without.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


@pytest.mark.parametrize("generator", IMAGE_LEVEL)
def test_proposals_in_training_are_those_of_the_evaluation(generator):
    # With equal limits: the same weights propose the same.
    model = build_detector(generator, "FasterRCNN", "MODEL.SPOP.PRE_NMS_TOPK_TEST", 300,
                           "MODEL.SPOP.POST_NMS_TOPK_TRAIN", 1000)  # fmt: skip
    proposals, _ = training_step(model)
    images = model.preprocess_image(make_batch(BOXES, BOXES[:1]))
    with torch.no_grad():
        expected, _ = model.eval().proposal_generator(images, {}, None)
    for a, b in zip(proposals, expected, strict=True):
        assert torch.equal(a.proposal_boxes.tensor, b.proposal_boxes.tensor)
        assert torch.equal(a.objectness_logits, b.objectness_logits)


def test_deepmask_decodes_as_many_masks_as_training_needs(monkeypatch):
    decoded = []
    boxes_of_masks = deepmask_generator.boxes_of_masks

    def spy(mask_logits, *args):
        decoded.append(len(mask_logits))
        return boxes_of_masks(mask_logits, *args)

    monkeypatch.setattr(deepmask_generator, "boxes_of_masks", spy)
    model = build_detector(
        "DeepMask", "FasterRCNN",
        *("MODEL.DEEPMASK.PRE_NMS_TOPK_TRAIN", 7, "MODEL.DEEPMASK.POST_NMS_TOPK_TRAIN", 5),
        *("MODEL.DEEPMASK.PRE_NMS_TOPK_TEST", 20, "MODEL.DEEPMASK.POST_NMS_TOPK_TEST", 12),
        *("MODEL.DEEPMASK.MASK_THRESH", 0.01),
    )  # fmt: skip
    proposals, _ = training_step(model)
    assert decoded == [7, 7] and [len(x) for x in proposals] == [5, 5]
    model.eval()(make_batch(BOXES))
    assert decoded == [7, 7, 20]


def test_spop_refines_as_many_boxes_as_training_needs(monkeypatch):
    model = build_detector(
        "SPOP", "FasterRCNN",
        *("MODEL.SPOP.PRE_NMS_TOPK_TRAIN", 90, "MODEL.SPOP.POST_NMS_TOPK_TRAIN", 2),
        *("MODEL.SPOP.PRE_NMS_TOPK_TEST", 30, "MODEL.SPOP.POST_NMS_TOPK_TEST", 12),
        *("MODEL.SPOP.NMS_THRESH", 1.0),
    )  # fmt: skip
    chosen = []
    select = spop_generator.select_proposals

    def spy(initial, *args, **kwargs):
        chosen.append(len(initial.boxes))
        return select(initial, *args, **kwargs)

    monkeypatch.setattr(spop_generator, "select_proposals", spy)
    proposals, _ = training_step(model)
    assert chosen == [90, 90] and [len(x) for x in proposals] == [2, 2]
    model.eval()(make_batch(BOXES))
    assert chosen == [90, 90, 30]


def test_detectornet_proposes_as_many_as_its_scales_yield():
    model = build_detector(
        "DetectorNet", "FasterRCNN",
        *("MODEL.DETECTORNET.NUM_SCALES", 2, "MODEL.DETECTORNET.TOPK_PER_SCALE", 3),
    )  # fmt: skip
    proposals, _ = training_step(model)
    assert all(0 < len(x) <= 6 for x in proposals)


# (height, width) of images as they were taken, and of the input of a detector that enlarges each by
# a factor of its own.
NATIVE_SIZES = [(48, 64), (72, 40)]
INPUT_SIZES = [(96, 128), (108, 60)]


def resized_batch():
    torch.manual_seed(0)
    return [
        {
            "image": torch.randint(0, 256, (3, *size)).float(),
            "instances": add_rectangle_masks(make_instances(size, boxes)),
            "height": height,
            "width": width,
        }
        for size, (height, width), boxes in zip(
            INPUT_SIZES, NATIVE_SIZES, [BOXES, BOXES[:1]], strict=True
        )
    ]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("generator", "module", "function", "scales"),
    [
        ("DeepMask", image_canvas, "scale_image", (0.5, 1.0)),
        ("SPOP", pixel_networks, "resize_image", (1.0, 2.0)),
    ],
)
def test_the_pyramid_refers_to_native_images(
    generator, module, function, scales, training, monkeypatch
):
    model = hand_over_native_sizes(build_detector(generator)).train(training)
    seen = []
    resize = getattr(module, function)

    def spy(image, *arguments, **options):
        resized = resize(image, *arguments, **options)
        seen.append((tuple(image.shape[1:]), tuple(resized.shape[1:])))
        return resized

    monkeypatch.setattr(module, function, spy)
    proposals = []
    model.proposal_generator.register_forward_hook(lambda *args: proposals.extend(args[2][0]))
    with EventStorage():
        model(resized_batch())
    # Of each image, without the padding of the batch, the scales of the native image.
    expected = [
        (input_size, (round(scale * height), round(scale * width)))
        for input_size, (height, width) in zip(INPUT_SIZES, NATIVE_SIZES, strict=True)
        for scale in scales
    ]
    assert [x for x in seen if x in expected or not training] == expected
    # Proposals are in pixels of the input all the same.
    for proposals_i, (height, width) in zip(proposals, INPUT_SIZES, strict=True):
        assert proposals_i.image_size == (height, width)
        corner = proposals_i.proposal_boxes.tensor[:, 2:].amax(dim=0)
        assert (corner > corner.new_tensor([width, height]) / 2).all()


@pytest.mark.parametrize("generator", ["DeepMask", "SPOP"])
def test_an_image_of_a_resized_batch_gets_what_it_gets_alone(generator):
    model = hand_over_native_sizes(build_detector(generator)).eval()
    seen = []
    model.proposal_generator.register_forward_hook(lambda *args: seen.extend(args[2][0]))
    batch = resized_batch()
    model(batch)
    for x in batch:
        model([x])
    for together, alone in zip(seen[:2], seen[2:], strict=True):
        assert len(alone) > 0
        assert torch.equal(alone.proposal_boxes.tensor, together.proposal_boxes.tensor)
        assert torch.equal(alone.objectness_logits, together.objectness_logits)
