"""Tests of d2proposals.engine.part_weights."""

import importlib
import logging
import os
import pickle

import pytest
import torch
from detectron2.modeling import build_model

from d2proposals.engine import (
    ProposalCheckpointer,
    Trainer,
    load_part_weights,
    load_trained_model,
    warn_of_frozen_random_norm,
)
from d2proposals.engine.freezing import warn_of_frozen_random_parts
from tests.common import make_cfg
from tests.engine.test_checkpointer import RunsCode
from tests.engine.test_trainer import tiny_cfg
from tests.test_contract import GENERATORS, host_cfg

GENERATOR_KEY = "MODEL.PROPOSAL_GENERATOR.WEIGHTS"
BACKBONE_KEY = "MODEL.BACKBONE.WEIGHTS"


def seeded_model(cfg, seed):
    torch.manual_seed(seed)
    return build_model(cfg)


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def write(file, state, kind="pth"):
    """Write weights as each of the kinds of files that there are."""
    if kind == "pkl":
        state = {name: value.numpy() for name, value in state.items()}
        file = file.with_suffix(".pkl")
        file.write_bytes(pickle.dumps({"model": state, "__author__": "me"}))
        return str(file)
    if kind == "parallel":
        state = {f"module.{name}": value for name, value in state.items()}
    torch.save(state if kind == "bare" else {"model": state, "iteration": 7}, file)
    return str(file)


def load(cfg, model, **kwargs):
    checkpointer = ProposalCheckpointer(model)
    checkpointer.load(cfg.MODEL.WEIGHTS)
    load_part_weights(cfg, checkpointer, **kwargs)
    return checkpointer


def from_part(state, part):
    return {name: value for name, value in state.items() if name.startswith(part + ".")}


def assert_equal(state, expected):
    assert state.keys() == expected.keys() and len(state) > 0
    assert [name for name in state if not torch.equal(state[name], expected[name])] == []


@pytest.mark.parametrize("host", ["ProposalNetwork", "FasterRCNN"])
@pytest.mark.parametrize("generator", GENERATORS)
def test_only_the_generator_is_taken(generator, host, tmp_path):
    source = seeded_model(host_cfg(generator, host), 1)
    path = write(tmp_path / "source.pth", state_of(source))
    cfg = host_cfg(generator, "CascadeRCNN", "MODEL.WEIGHTS", "", GENERATOR_KEY, path)
    model = seeded_model(cfg, 2)
    before = state_of(model)
    load(cfg, model)
    after = state_of(model)
    part = "proposal_generator"
    assert_equal(from_part(after, part), from_part(state_of(source), part))
    assert not all(torch.equal(after[name], before[name]) for name in from_part(before, part))
    for other in ("backbone", "roi_heads"):
        assert_equal(from_part(after, other), from_part(before, other))


@pytest.mark.parametrize("kind", ["pth", "bare", "parallel", "pkl"])
def test_kinds_of_files(kind, tmp_path):
    source = seeded_model(host_cfg("RPN"), 1)
    path = write(tmp_path / "source.pth", state_of(source), kind)
    cfg = host_cfg("RPN", "FasterRCNN", "MODEL.WEIGHTS", "", GENERATOR_KEY, path)
    model = seeded_model(cfg, 2)
    load(cfg, model)
    assert_equal(model.proposal_generator.state_dict(), source.proposal_generator.state_dict())


def test_both_parts_come_after_the_weights_of_the_model(tmp_path):
    whole = seeded_model(host_cfg("SCRPN", "FasterRCNN"), 1)
    pair = seeded_model(host_cfg("SCRPN"), 2)
    whole_path = write(tmp_path / "whole.pth", state_of(whole))
    pair_path = write(tmp_path / "pair.pth", state_of(pair))
    cfg = host_cfg(
        *("SCRPN", "FasterRCNN", "MODEL.WEIGHTS", whole_path),
        *(BACKBONE_KEY, pair_path, GENERATOR_KEY, pair_path),
    )
    model = seeded_model(cfg, 3)
    assert load(cfg, model).missing_keys == set()
    assert_equal(model.roi_heads.state_dict(), whole.roi_heads.state_dict())
    assert_equal(model.backbone.state_dict(), pair.backbone.state_dict())
    assert_equal(model.proposal_generator.state_dict(), pair.proposal_generator.state_dict())


@pytest.mark.parametrize("only_missing", [False, True])
@pytest.mark.parametrize(
    ("generator", "backbone_key", "is_warned"),
    [
        ("SCRPN", None, True),
        ("SCRPN", BACKBONE_KEY, False),
        ("SCRPN", "MODEL.WEIGHTS", False),
        ("SPOP", None, False),
    ],
)
def test_warnings_of_a_generator_on_foreign_features(
    generator, backbone_key, is_warned, only_missing, tmp_path, caplog
):
    source = seeded_model(host_cfg(generator), 1)
    path = write(tmp_path / "source.pth", state_of(source))
    overrides = ["MODEL.WEIGHTS", "", GENERATOR_KEY, path]
    cfg = host_cfg(generator, "FasterRCNN", *overrides)
    if backbone_key is not None:
        cfg.merge_from_list([backbone_key, os.path.relpath(path)])
    model = seeded_model(cfg, 2)
    checkpointer = ProposalCheckpointer(model)
    with caplog.at_level(logging.WARNING, logger="d2proposals"):
        load_part_weights(cfg, checkpointer, only_missing=only_missing)
    named = [x for x in caplog.records if "feature maps of another" in x.getMessage()]
    assert len(named) == is_warned


@pytest.mark.parametrize("has_generator", [True, False])
def test_an_evaluation_keeps_a_generator_that_was_trained_further(has_generator, tmp_path):
    cfg = host_cfg("ZIP", "FasterRCNN")
    tuned, alone = seeded_model(cfg, 1), seeded_model(host_cfg("ZIP"), 2)
    state = state_of(tuned)
    if not has_generator:
        # Of a Fast R-CNN.
        state = {k: v for k, v in state.items() if not k.startswith("proposal_generator.")}
    whole_path = write(tmp_path / "whole.pth", state)
    cfg.merge_from_list(
        ["MODEL.WEIGHTS", whole_path, GENERATOR_KEY, write(tmp_path / "a.pth", state_of(alone))]
    )
    model = seeded_model(cfg, 3)
    load(cfg, model, only_missing=True)
    expected = tuned if has_generator else alone
    assert_equal(model.proposal_generator.state_dict(), expected.proposal_generator.state_dict())
    assert_equal(model.roi_heads.state_dict(), tuned.roi_heads.state_dict())
    # A training starts with it in any case.
    load(cfg, model)
    assert_equal(model.proposal_generator.state_dict(), alone.proposal_generator.state_dict())


def test_what_is_missing_is_known(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    checkpointer = ProposalCheckpointer(model)
    everything = {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert checkpointer.missing_keys == everything
    checkpointer.load("")
    assert checkpointer.missing_keys == everything
    state = {"0.weight": torch.ones(2, 2), "0.bias": torch.ones(2), "1.bias": torch.ones(3)}
    checkpointer.load(write(tmp_path / "some.pth", state))
    assert checkpointer.missing_keys == {"1.weight", "1.bias"}


def error_of(tmp_path, path, generator="SCRPN", key=GENERATOR_KEY, *overrides):
    cfg = host_cfg(generator, "FasterRCNN", "MODEL.WEIGHTS", "", key, str(path), *overrides)
    model = seeded_model(cfg, 2)
    before = state_of(model)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load(cfg, model)
    assert_equal(state_of(model), before)
    message = str(error.value)
    assert key in message and str(path) in message and "\n" not in message
    return message


def test_a_file_that_is_missing(tmp_path):
    message = error_of(tmp_path, tmp_path / "gone.pth")
    assert message.endswith(
        f"is missing. Set {GENERATOR_KEY} to a file that exists ('' takes them from MODEL.WEIGHTS)."
    )


@pytest.mark.parametrize("size", [0, 100, -9])
def test_a_file_that_is_cut_off(tmp_path, size):
    path = write(tmp_path / "cut.pth", state_of(seeded_model(host_cfg("SCRPN"), 1)))
    content = open(path, "rb").read()
    with open(path, "wb") as f:
        f.write(content[:size])
    message = error_of(tmp_path, path)
    assert "cut off" in message and "--resume" not in message


def test_code_is_not_run(tmp_path):
    file, folder = tmp_path / "evil.pth", tmp_path / "made"
    torch.save({"model": RunsCode(folder)}, file)
    assert "which may run code" in error_of(tmp_path, file)
    assert not folder.exists()


@pytest.mark.parametrize("content", [[1, 2], {"model": [torch.ones(2)]}, {"model": {3: 4}}])
def test_a_file_of_something_else(content, tmp_path):
    torch.save(content, tmp_path / "odd.pth")
    assert "holds no weights with names" in error_of(tmp_path, tmp_path / "odd.pth")


@pytest.mark.parametrize("key", [GENERATOR_KEY, BACKBONE_KEY])
def test_a_file_without_the_part(key, tmp_path):
    path = write(tmp_path / "R-50.pth", {"stem.weight": torch.ones(2), "res2.w": torch.ones(2)})
    message = error_of(tmp_path, path, "SCRPN", key)
    part = "proposal_generator" if key == GENERATOR_KEY else "backbone"
    assert f"has no entries '{part}.*', but res2, stem." in message


def test_another_generator(tmp_path):
    path = write(tmp_path / "rpn.pth", state_of(seeded_model(host_cfg("RPN"), 1)))
    message = error_of(tmp_path, path)
    assert "has no proposal_generator.head." in message
    assert "but proposal_generator.rpn_head." in message
    assert "MODEL.PROPOSAL_GENERATOR.NAME (SCRPN), MODEL.SCRPN" in message


@pytest.mark.parametrize(
    ("generator", "key", "overrides", "entry", "hint"),
    [
        ("SCRPN", GENERATOR_KEY, ("MODEL.SCRPN.HEAD_CHANNELS", 8), "head.", "MODEL.SCRPN,"),
        ("RPN", GENERATOR_KEY, ("MODEL.ANCHOR_GENERATOR.SIZES", [[8, 9]]), "rpn_head.objectness",
         "MODEL.ANCHOR_GENERATOR,"),
        ("ZIP", GENERATOR_KEY, ("MODEL.FPN.OUT_CHANNELS", 16), "heads.", "channels of its back"),
        ("SPOP", GENERATOR_KEY, ("MODEL.SPOP.HEAD_CHANNELS", 8), "networks.", "MODEL.SPOP."),
        (
            *("DeepMask", GENERATOR_KEY, ("MODEL.DEEPMASK.CODE_DIM", 4)),
            *("network.", "MODEL.DEEPMASK and MODEL.VGG."),
        ),
        ("RPN", BACKBONE_KEY, ("MODEL.FPN.OUT_CHANNELS", 16), "fpn_lateral", "MODEL.FPN."),
    ],
)  # fmt: skip
def test_shapes_that_differ(generator, key, overrides, entry, hint, tmp_path):
    source = seeded_model(host_cfg(generator, "FasterRCNN", *overrides), 1)
    path = write(tmp_path / "other.pth", state_of(source))
    message = error_of(tmp_path, path, generator, key)
    part = "proposal_generator" if key == GENERATOR_KEY else "backbone"
    assert f"{key}: {part}.{entry}" in message and hint in message
    assert f" in {path}, (" in message and " in the model." in message


def test_entries_that_are_missing_or_too_many(tmp_path, caplog):
    small = ("MODEL.SCRPN.IOU_MASK.ENABLED", False)
    path = write(tmp_path / "small.pth", state_of(seeded_model(host_cfg("SCRPN"), 1)))
    few = {k: v for k, v in torch.load(path)["model"].items() if "iou_mask" not in k}
    assert len(few) < len(torch.load(path)["model"])
    few_path = write(tmp_path / "few.pth", few)
    freeze = ("MODEL.PROPOSAL_GENERATOR.FREEZE", True)
    message = error_of(tmp_path, few_path, "SCRPN", GENERATOR_KEY, *freeze)
    assert "iou_mask" in message and "entries are missing" in message
    assert message.endswith("Less than the whole proposal_generator is enough to train it only.")
    # The other way round the model is whole.
    cfg = host_cfg("SCRPN", "FasterRCNN", "MODEL.WEIGHTS", "", GENERATOR_KEY, path, *small)
    model = seeded_model(cfg, 2)
    with caplog.at_level(logging.WARNING, logger="d2proposals"):
        load(cfg, model)
    record, _ = caplog.records  # the other one is of its backbone
    assert "the model has no proposal_generator." in record.getMessage()
    assert "iou_mask" in record.getMessage()


def test_what_is_not_learnt_may_be_missing_or_too_many(tmp_path, caplog):
    source = state_of(seeded_model(host_cfg("RPN"), 1))
    source = {k: v for k, v in source.items() if not k.endswith("num_batches_tracked")}
    source["proposal_generator.anchor_generator.cell_anchors.0"] = torch.ones(3, 4)
    path = write(tmp_path / "old.pth", source)
    cfg = host_cfg(
        *("RPN", "FasterRCNN", "MODEL.WEIGHTS", "", GENERATOR_KEY, path, BACKBONE_KEY, path)
    )
    model = seeded_model(cfg, 2)
    with caplog.at_level(logging.WARNING, logger="d2proposals"):
        load(cfg, model)
    assert caplog.records == []
    name = "backbone.fpn_lateral2.weight"
    assert torch.equal(model.state_dict()[name], source[name])


@pytest.mark.parametrize("kind", ["backbone", "proposal_generator"])
def test_frozen_random_weights(kind, tmp_path, caplog):
    node = kind.upper()
    cfg = host_cfg("RPN", "FasterRCNN", f"MODEL.{node}.FREEZE", True, "MODEL.WEIGHTS", "")
    with caplog.at_level(logging.WARNING, logger="d2proposals"):
        warn_of_frozen_random_parts(cfg, load(cfg, seeded_model(cfg, 1)).missing_keys)
    (record,) = caplog.records
    assert f"random weights of the {kind} stay" in record.getMessage()
    caplog.clear()
    path = write(tmp_path / "a.pth", state_of(seeded_model(host_cfg("RPN"), 1)))
    cfg.MODEL[node].WEIGHTS = path
    with caplog.at_level(logging.WARNING, logger="d2proposals"):
        warn_of_frozen_random_parts(cfg, load(cfg, seeded_model(cfg, 1)).missing_keys)
    assert not any("random weights" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("key", ["MODEL.WEIGHTS", BACKBONE_KEY, GENERATOR_KEY])
def test_trained_statistics_can_come_with_the_backbone(key, caplog):
    cfg = make_cfg("zip_rpn_only.yaml", "MODEL.WEIGHTS", "", key, "some.pth")
    with caplog.at_level(logging.WARNING, logger="d2proposals"):
        warn_of_frozen_random_norm(cfg)
    assert len(caplog.records) == (key == GENERATOR_KEY)


def tiny_detector_cfg(output_dir, *overrides):
    return tiny_cfg(
        output_dir,
        *("MODEL.META_ARCHITECTURE", "GeneralizedRCNN"),
        *("MODEL.PROPOSAL_GENERATOR.PROPOSALS_IN_TRAINING", True),
        *("MODEL.ROI_HEADS.NAME", "StandardROIHeads"),
        *("MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4", "p5"]),
        *("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NUM_FC", 1),
        *("MODEL.ROI_BOX_HEAD.FC_DIM", 8, "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 3),
        *("MODEL.PROPOSAL_GENERATOR.FREEZE", True, "MODEL.BACKBONE.FREEZE", True),
        *overrides,
    )


def test_a_training_starts_with_them_and_goes_on_without(tiny_coco, tmp_path, monkeypatch):
    pair = seeded_model(tiny_cfg(tmp_path), 5)
    path = write(tmp_path / "pair.pth", state_of(pair))
    overrides = (GENERATOR_KEY, path, BACKBONE_KEY, path, "SOLVER.MAX_ITER", 1)
    cfg = tiny_detector_cfg(tmp_path / "out", *overrides, "DATASETS.TEST", ())
    trainer = Trainer(cfg)
    # There is nothing to resume: this is the start.
    trainer.resume_or_load(resume=True)
    heads = state_of(trainer.model.roi_heads)
    trainer.train()
    for part in ("backbone", "proposal_generator"):
        expected = state_of(getattr(pair, part))
        assert_equal(state_of(getattr(trainer.model, part)), expected)
    trained = state_of(trainer.model.roi_heads)
    assert not all(torch.equal(heads[name], trained[name]) for name in heads)

    os.remove(path)
    resumed = Trainer(cfg)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 1
    assert_equal(state_of(resumed.model), state_of(trainer.model))
    with pytest.raises(FileNotFoundError, match=BACKBONE_KEY):
        resumed.resume_or_load(resume=False)

    thawed = cfg.clone()
    thawed.MODEL.PROPOSAL_GENERATOR.FREEZE = False
    with pytest.raises(ValueError, match=r"another model, or .* MODEL\.PROPOSAL_GENERATOR\.FR"):
        Trainer(thawed).resume_or_load(resume=True)

    # An evaluation of the result needs no other file, either.
    train_net = importlib.import_module("train_net")
    cfg.MODEL.WEIGHTS = str(tmp_path / "out" / "model_final.pth")
    cfg.DATASETS.TEST = ("tiny_val",)
    seen = []
    monkeypatch.setattr(Trainer, "test", lambda cfg, model: seen.append(state_of(model)) or {})
    train_net.evaluate(cfg)
    assert_equal(seen[0], state_of(trainer.model))


@pytest.mark.parametrize("parts", [("backbone",), ("backbone", "proposal_generator"), ()])
def test_an_evaluation_says_what_is_random(parts, tiny_coco, tmp_path, monkeypatch, caplog):
    train_net = importlib.import_module("train_net")
    path = write(tmp_path / "pair.pth", state_of(seeded_model(tiny_cfg(tmp_path), 5)))
    keys = [x for part in parts for x in (f"MODEL.{part.upper()}.WEIGHTS", path)]
    monkeypatch.setattr(Trainer, "test", lambda cfg, model: {})
    with caplog.at_level(logging.WARNING, logger="d2proposals"):
        train_net.evaluate(tiny_cfg(tmp_path / "out", *keys))
    messages = [x.getMessage() for x in caplog.records if "random weights (" in x.getMessage()]
    expected = {"backbone", "proposal_generator"} - set(parts)
    assert len(messages) == bool(expected)
    assert all(f"({', '.join(sorted(expected))})" in message for message in messages)


def test_commands_on_single_images_take_the_part_too(tmp_path):
    source = seeded_model(host_cfg("RPN"), 1)
    path = write(tmp_path / "source.pth", state_of(source))
    cfg = host_cfg("RPN", "FasterRCNN", "MODEL.WEIGHTS", "", GENERATOR_KEY, path)
    model = load_trained_model(cfg)
    assert_equal(model.proposal_generator.state_dict(), source.proposal_generator.state_dict())
