"""Tests of d2proposals.engine.freezing."""

import copy
import io
import logging

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.solver import get_default_optimizer_params
from detectron2.utils.events import EventStorage
from torch import nn

from d2proposals.engine import (
    ProposalCheckpointer,
    Trainer,
    check_trainable,
    freeze,
    freeze_generator,
    freeze_parts,
    load_part_weights,
)
from d2proposals.engine.freezing import warn_of_frozen_random_layers
from tests.common import make_cfg
from tests.test_contract import BOXES, GENERATORS, host_cfg, make_batch

FREEZE_GENERATOR = ("MODEL.PROPOSAL_GENERATOR.FREEZE", True)
FREEZE_BACKBONE = ("MODEL.BACKBONE.FREEZE", True)
# Dropout and batch normalisation in the generators that can have them.
WITH_BN = {
    "DeepMask": ("MODEL.VGG.NORM", "BN"),
    "SPOP": ("MODEL.SPOP.TRUNK.NORM", "BN"),
    "DetectorNet": ("MODEL.DETECTORNET.NORM", "BN"),
}


def frozen_model(generator, host="FasterRCNN", *overrides):
    cfg = host_cfg(generator, host, *WITH_BN.get(generator, ()), *overrides)
    torch.manual_seed(0)
    model = build_model(cfg).train()
    freeze_parts(cfg, model)
    return model


def copy_of_state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same_state(module, expected):
    state = module.state_dict()
    assert state.keys() == expected.keys()
    assert [name for name, value in state.items() if not torch.equal(value, expected[name])] == []


def small_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))


def test_a_frozen_module_stays_in_evaluation():
    model = nn.Sequential(small_network(), small_network())
    freeze(model[0])
    assert model.train() is model and model.training and model[1].training
    assert not any(module.training for module in model[0].modules())
    for module in model[0].modules():
        assert module.train(True) is module
    model[0].train()
    assert not any(module.training for module in model[0].modules())
    before, x = copy_of_state(model[0]), torch.randn(8, 3)
    assert torch.equal(model[0](x), model[0](x))
    assert_same_state(model[0], before)
    assert not any(parameter.requires_grad for parameter in model[0].parameters())
    assert all(parameter.requires_grad for parameter in model[1].parameters())


def test_freezing_twice_is_freezing_once():
    model = small_network()
    freeze(model)
    train = model.train
    freeze(model)
    assert model.train is train


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_is_frozen_and_on_its_own(how):
    model = nn.Sequential(small_network())
    freeze(model[0])
    if how == "deepcopy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    other.train()
    assert other.training and not any(module.training for module in other[0].modules())
    assert other[0].train.module is other[0] and model[0].train.module is model[0]


@pytest.mark.parametrize("generator", GENERATORS)
def test_a_copied_detector_uses_its_own_generator(generator):
    model = frozen_model(generator, "FasterRCNN", *FREEZE_GENERATOR)
    other = copy.deepcopy(model)
    assert other.proposal_generator.forward.generator is other.proposal_generator
    with torch.no_grad():
        for parameter in other.proposal_generator.parameters():
            parameter.fill_(float("nan"))
        proposals, _ = model.eval().proposal_generator(*inputs_of(model))
    assert all(p.objectness_logits.isfinite().all() for p in proposals)


def inputs_of(model):
    images = model.preprocess_image(make_batch(BOXES, []))
    return images, model.backbone(images.tensor)


def test_names_in_the_state_dict_stay(caplog):
    cfg = host_cfg("SCRPN", "FasterRCNN", *FREEZE_GENERATOR, *FREEZE_BACKBONE)
    plain = build_model(cfg)
    names = list(plain.state_dict())
    frozen = frozen_model("SCRPN", "FasterRCNN", *FREEZE_GENERATOR, *FREEZE_BACKBONE)
    assert list(frozen.state_dict()) == names
    assert [name for name, _ in frozen.named_modules()] == [n for n, _ in plain.named_modules()]


@pytest.mark.parametrize("frozen_first", [True, False])
def test_checkpoints_go_both_ways_without_a_warning(frozen_first, tmp_path, caplog):
    frozen = frozen_model("ZIP", "FasterRCNN", *FREEZE_GENERATOR, *FREEZE_BACKBONE)
    torch.manual_seed(1)
    plain = build_model(host_cfg("ZIP", "FasterRCNN"))
    source, target = (frozen, plain) if frozen_first else (plain, frozen)
    ProposalCheckpointer(source, str(tmp_path)).save("model_final")
    with caplog.at_level(logging.WARNING):
        ProposalCheckpointer(target).load(str(tmp_path / "model_final.pth"))
    assert caplog.records == []
    assert_same_state(target, copy_of_state(source))


@pytest.mark.parametrize("host", ["FasterRCNN", "CascadeRCNN"])
@pytest.mark.parametrize("generator", GENERATORS)
def test_a_frozen_generator_proposes_in_training_what_it_does_in_evaluation(generator, host):
    model = frozen_model(generator, host, *FREEZE_GENERATOR)
    before = copy_of_state(model.proposal_generator)
    seen, has_graph = [], []
    model.proposal_generator.register_forward_hook(lambda *args: seen.append(args[1:]))
    for layer in model.proposal_generator.modules():
        layer.register_forward_pre_hook(lambda *_: has_graph.append(torch.is_grad_enabled()))
    with EventStorage():
        losses = model(make_batch(BOXES, BOXES[:1]))
        sum(losses.values()).backward()
    ((images, features, _), (proposals, generator_losses)) = seen[0]
    assert generator_losses == {} and not any("rpn" in x or "mask" in x for x in losses)
    assert any(x.requires_grad for x in features.values())
    # The generator's own hook comes before its pass.
    assert has_graph[0] and len(has_graph) > 1 and not any(has_graph[1:])
    for proposals_i in proposals:
        assert set(proposals_i.get_fields()) == {"proposal_boxes", "objectness_logits"}
        assert not proposals_i.proposal_boxes.tensor.requires_grad
        assert not proposals_i.objectness_logits.requires_grad
    assert_same_state(model.proposal_generator, before)
    assert all(parameter.grad is None for parameter in model.proposal_generator.parameters())
    others = [model.backbone, model.roi_heads]
    assert all(p.grad is not None for part in others for p in part.parameters() if p.requires_grad)

    model.eval()
    features = {name: value.detach() for name, value in features.items()}
    with torch.no_grad():
        expected, _ = model.proposal_generator(images, features, None)
    with_masks = {"proposal_masks"} if generator == "DeepMask" else set()
    for a, b in zip(proposals, expected, strict=True):
        # Evaluation has what it always had.
        assert set(b.get_fields()) == {"proposal_boxes", "objectness_logits"} | with_masks
        assert len(a) > 0
        assert torch.equal(a.proposal_boxes.tensor, b.proposal_boxes.tensor)
        assert torch.equal(a.objectness_logits, b.objectness_logits)


def test_a_frozen_generator_samples_no_labels(monkeypatch):
    model = frozen_model("SCRPN", "FasterRCNN", *FREEZE_GENERATOR)
    monkeypatch.delattr(type(model.proposal_generator), "label_and_sample_locations")
    with EventStorage() as storage:
        model(make_batch(BOXES, []))
        assert [name for name in storage.latest() if name.startswith("scrpn/")] == []


def test_a_frozen_generator_that_nobody_asks_computes_nothing():
    # DetectorNet's own heads train on crops of their own.
    model = frozen_model(
        "DetectorNet", "FasterRCNN", *FREEZE_GENERATOR, "MODEL.ROI_HEADS.NAME", "DetectorNetHeads"
    )
    generator, images = model.proposal_generator, inputs_of(model)
    calls = []
    generator.network.register_forward_pre_hook(lambda *_: calls.append(1))
    (first, second), losses = generator(*images, None)
    assert losses == {} and calls == [] and len(first) == len(second) == 0
    assert set(first.get_fields()) == {"proposal_boxes", "objectness_logits"}
    # Hard negatives may be its proposals, and in evaluation it proposes as ever.
    generator.proposals_in_training = True
    generator(*images, None)
    assert calls != []
    calls.clear()
    generator.proposals_in_training = False
    model.eval()
    generator(*images, None)
    assert calls != []


def test_numbers_of_proposals_are_those_of_the_test():
    keys = ("MODEL.RPN.POST_NMS_TOPK_TRAIN", 9, "MODEL.RPN.POST_NMS_TOPK_TEST", 5)
    for overrides, expected in ((FREEZE_GENERATOR, 5), ((), 9)):
        model = frozen_model("RPN", "FasterRCNN", *keys, *overrides)
        with EventStorage():
            batch = make_batch(BOXES, [])
            ground_truth = [x["instances"] for x in batch]
            proposals, _ = model.proposal_generator(*inputs_of(model), ground_truth)
        assert [len(x) for x in proposals] == [expected, expected]


def test_a_frozen_backbone_stays_and_the_rest_learns():
    cfg = host_cfg("SCRPN", "FasterRCNN", *FREEZE_BACKBONE)
    model = frozen_model("SCRPN", "FasterRCNN", *FREEZE_BACKBONE)
    before = {name: copy_of_state(part) for name, part in model.named_children()}
    optimizer = Trainer.build_optimizer(cfg, model)
    with EventStorage():
        losses = model(make_batch(BOXES, BOXES[:1]))
    sum(losses.values()).backward()
    optimizer.step()
    assert_same_state(model.backbone, before["backbone"])
    for name in ("proposal_generator", "roi_heads"):
        state = getattr(model, name).state_dict()
        # Linear and convolution weights; losses of the class-specific rest may be zero.
        assert any(not torch.equal(state[key], before[name][key]) for key in state)


def test_distributed_training(process_group):
    model = frozen_model("DeepMask", "FasterRCNN", *FREEZE_GENERATOR)
    before = copy_of_state(model.proposal_generator)
    parallel = nn.parallel.DistributedDataParallel(model).train()
    assert model.training and not model.proposal_generator.training
    for _ in range(2):
        # The second step fails if a parameter had no gradient in the first.
        with EventStorage():
            losses = parallel(make_batch(BOXES, BOXES[:1]))
        sum(losses.values()).backward()
    assert_same_state(model.proposal_generator, before)


@pytest.mark.parametrize("overrides", [FREEZE_GENERATOR, FREEZE_BACKBONE])
def test_the_optimizer_holds_no_frozen_parameter(overrides):
    cfg = host_cfg("ZIP", "CascadeRCNN", *overrides)
    model = frozen_model("ZIP", "CascadeRCNN", *overrides)
    optimizer = Trainer.build_optimizer(cfg, model)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    name = "proposal_generator" if overrides is FREEZE_GENERATOR else "backbone"
    expected = {id(p) for n, p in model.named_parameters() if not n.startswith(name)}
    assert held == expected
    stock = get_default_optimizer_params(model)
    assert {id(p) for group in stock for p in group["params"]} == expected


@pytest.mark.parametrize("generator", ["DeepMask", "SCRPN"])
def test_the_trainer_freezes_by_key(generator):
    model = Trainer.build_model(host_cfg(generator, "FasterRCNN", *FREEZE_GENERATOR)).train()
    trained = {name for name, part in model.named_children() if part.training}
    assert trained == {"backbone", "roi_heads"}
    assert not any(p.requires_grad for p in model.proposal_generator.parameters())
    model = Trainer.build_model(host_cfg(generator, "FasterRCNN")).train()
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("generator", "host", "overrides", "message"),
    [
        ("SCRPN", "ProposalNetwork", FREEZE_GENERATOR, "leaves no loss to train with"),
        ("SCRPN", "FasterRCNN", (), "no parameter to train"),
    ],
)
def test_nothing_to_train(generator, host, overrides, message):
    cfg = host_cfg(generator, host, *overrides)
    model = Trainer.build_model(cfg)
    if not overrides:
        freeze(model)
    with pytest.raises(ValueError, match=message):
        Trainer.build_optimizer(cfg, model)


@pytest.mark.parametrize("key", ["FREEZE", "WEIGHTS"])
def test_a_part_that_is_not_there(key, tmp_path):
    name = "MODEL.PROPOSAL_GENERATOR"
    value = True if key == "FREEZE" else "some.pth"
    cfg = host_cfg(
        "RPN", "FasterRCNN", f"{name}.NAME", "PrecomputedProposals", f"{name}.{key}", value
    )
    with pytest.raises(ValueError, match=rf"{name}\.{key} is .* has no proposal_generator"):
        model = Trainer.build_model(cfg)
        load_part_weights(cfg, ProposalCheckpointer(model))


@pytest.mark.parametrize(
    ("generator", "overrides", "warning"),
    [
        ("SCRPN", FREEZE_GENERATOR, "Set MODEL.BACKBONE.FREEZE True"),
        ("RPN", FREEZE_GENERATOR, "Set MODEL.BACKBONE.FREEZE True"),
        ("SCRPN", (*FREEZE_GENERATOR, *FREEZE_BACKBONE), None),
        ("DeepMask", FREEZE_GENERATOR, None),
        ("SCRPN", FREEZE_BACKBONE, None),
    ],
)  # fmt: skip
def test_warnings_of_a_generator_on_foreign_features(generator, overrides, warning, caplog):
    cfg = host_cfg(generator, "FasterRCNN", "MODEL.WEIGHTS", "", *overrides)
    model = Trainer.build_model(cfg)
    with caplog.at_level(logging.WARNING, logger="d2proposals"):
        check_trainable(cfg, model)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == (warning is not None)
    assert warning is None or warning in messages[0]


def test_a_generator_can_be_frozen_by_hand():
    model = build_model(host_cfg("DeepMask", "FasterRCNN")).train()
    freeze_generator(model.proposal_generator)
    freeze_generator(model.proposal_generator)
    with EventStorage():
        # Before anything has called train() again.
        losses = model(make_batch(BOXES, []))
    assert not any("deepmask" in name for name in losses)


def test_layers_that_stay_random_are_warned_of(caplog):
    overrides = ("MODEL.TORCHVISION.NORM", "GN", "MODEL.TORCHVISION.WEIGHTS", "")
    for freeze_at, number in ((3, 1), (0, 0)):
        cfg = make_cfg(
            "photos/sc_rpn_mobilenet_v2.yaml", *overrides, "MODEL.BACKBONE.FREEZE_AT", freeze_at
        )
        model = Trainer.build_model(cfg)
        missing_keys = set(model.state_dict())
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="d2proposals"):
            warn_of_frozen_random_layers(cfg, model, missing_keys)
        messages = [record.getMessage() for record in caplog.records]
        assert len(messages) == number
        assert all("frozen with random weights, the first is backbone." in x for x in messages)
    # Those of torchvision, and what a checkpoint has set, are not random.
    cfg.MODEL.BACKBONE.FREEZE_AT = 3
    model = Trainer.build_model(cfg)
    caplog.clear()
    warn_of_frozen_random_layers(cfg, model, set())
    cfg.MODEL.TORCHVISION.WEIGHTS = "IMAGENET1K_V1"
    warn_of_frozen_random_layers(cfg, model, set(model.state_dict()))
    assert not caplog.records
