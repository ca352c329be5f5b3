"""Parts of which a checkpoint has some weights only, and what is said of random ones."""

import logging

import pytest
import torch
from detectron2.modeling import build_model

from d2proposals.engine import (
    ProposalCheckpointer,
    Trainer,
    check_weights_are_whole,
    load_part_weights,
    load_trained_model,
)
from d2proposals.engine.part_weights import warn_of_random_generator
from tests.common import make_cfg
from tests.engine.test_part_weights import (
    BACKBONE_KEY,
    GENERATOR_KEY,
    assert_equal,
    from_part,
    load,
    seeded_model,
    state_of,
    tiny_detector_cfg,
    write,
)
from tests.test_contract import host_cfg

# The networks that the image-level generators take from ImageNet.
TRUNKS = {"DeepMask": ".trunk.", "SPOP": ".trunk.", "DetectorNet": ".trunk."}
IMAGE_LEVEL = list(TRUNKS)
PART = "proposal_generator"


def messages_of(caplog, level=logging.WARNING):
    records = [x for x in caplog.records if x.name.startswith("d2proposals")]
    return [x.getMessage() for x in records if x.levelno == level]


def write_trunk(tmp_path, generator, change=lambda state: state):
    """A file of a generator's trunk alone."""
    state = state_of(seeded_model(host_cfg(generator, "FasterRCNN"), 1))
    trunk = {name: x for name, x in from_part(state, PART).items() if TRUNKS[generator] in name}
    assert 0 < len(trunk) < len(from_part(state, PART))
    return write(tmp_path / "trunk.pth", change(trunk)), trunk


@pytest.mark.parametrize("generator", IMAGE_LEVEL)
def test_a_training_starts_from_a_trunk(generator, tmp_path, caplog):
    path, trunk = write_trunk(tmp_path, generator)
    cfg = host_cfg(generator, "FasterRCNN", "MODEL.WEIGHTS", "", GENERATOR_KEY, path)
    model = seeded_model(cfg, 2)
    before = state_of(model)
    with caplog.at_level(logging.WARNING, logger="d2proposals"):
        checkpointer = load(cfg, model)
    after = state_of(model)
    assert_equal({name: after[name] for name in trunk}, trunk)
    others = {name: value for name, value in before.items() if name not in trunk}
    assert_equal({name: after[name] for name in others}, others)
    assert checkpointer.missing_keys == set(others)
    random = list(from_part(others, PART))
    (message,) = messages_of(caplog)
    assert message.startswith(f"{GENERATOR_KEY}: {path}")
    assert f"{len(random)} of its {len(random) + len(trunk)} entries start from random" in message
    assert message.endswith(f"the first is {random[0]}.")


def test_a_backbone_too(tmp_path, caplog):
    state = state_of(seeded_model(host_cfg("SCRPN", "FasterRCNN"), 1))
    state = {name: value for name, value in state.items() if name.startswith("backbone.bottom_up.")}
    path = write(tmp_path / "bottom_up.pth", state)
    cfg = host_cfg("SCRPN", "FasterRCNN", "MODEL.WEIGHTS", "", BACKBONE_KEY, path)
    model = seeded_model(cfg, 2)
    with caplog.at_level(logging.WARNING, logger="d2proposals"):
        load(cfg, model)
    assert_equal({name: model.state_dict()[name] for name in state}, state)
    (message,) = messages_of(caplog)
    assert "has a part of the backbone" in message and "the first is backbone.fpn_" in message


def test_what_the_model_s_checkpoint_has_set_is_not_random(tmp_path, caplog):
    whole = write(tmp_path / "whole.pth", state_of(seeded_model(host_cfg("SPOP", "FasterRCNN"), 3)))
    path, trunk = write_trunk(tmp_path, "SPOP")
    cfg = host_cfg("SPOP", "FasterRCNN", "MODEL.WEIGHTS", whole, GENERATOR_KEY, path)
    model = seeded_model(cfg, 2)
    with caplog.at_level(logging.WARNING, logger="d2proposals"):
        assert load(cfg, model).missing_keys == set()
    assert messages_of(caplog) == []
    assert_equal({name: model.state_dict()[name] for name in trunk}, trunk)


def rename_one(state):
    first = next(iter(state))
    return {name if name != first else f"{PART}.odd.weight": x for name, x in state.items()}


def reshape_one(state):
    first = next(iter(state))
    return {**state, first: torch.zeros(7)}


@pytest.mark.parametrize(
    ("change", "overrides", "arguments", "part"),
    [
        (dict, ("MODEL.PROPOSAL_GENERATOR.FREEZE", True), {}, "entries are missing"),
        (dict, (), {"only_missing": True}, "entries are missing"),
        (rename_one, (), {}, f"but {PART}.odd.weight"),
        (reshape_one, (), {}, "is (7,) in"),
    ],
)
def test_a_trunk_that_will_not_do(change, overrides, arguments, part, tmp_path):
    path, _ = write_trunk(tmp_path, "DeepMask", change)
    cfg = host_cfg("DeepMask", "FasterRCNN", "MODEL.WEIGHTS", "", GENERATOR_KEY, path, *overrides)
    model = seeded_model(cfg, 2)
    before = state_of(model)
    with pytest.raises(ValueError) as error:
        load(cfg, model, **arguments)
    assert part in str(error.value) and "\n" not in str(error.value)
    assert_equal(state_of(model), before)


def write_short_names(tmp_path, state):
    """A file whose names fit wherever the network is, as Detectron2's ImageNet weights have."""
    path = tmp_path / "short.pth"
    torch.save({"model": state, "matching_heuristics": True}, path)
    return str(path)


def deepmask_trunk(*overrides):
    model = seeded_model(host_cfg("DeepMask", "FasterRCNN", *overrides), 1)
    return state_of(model.proposal_generator.network.trunk)


@pytest.mark.parametrize("backbone", ["build_resnet_fpn_backbone", "build_vgg_backbone"])
def test_names_that_fit_wherever_the_network_is(backbone, tmp_path):
    trunk = deepmask_trunk()
    path = write_short_names(tmp_path, trunk)
    overrides = ["MODEL.BACKBONE.NAME", backbone]
    if backbone == "build_vgg_backbone":
        # Its names end like the trunk's, but it is another part.
        overrides += ["MODEL.ROI_HEADS.IN_FEATURES", ["stage3"]]
    cfg = host_cfg("DeepMask", "FasterRCNN", "MODEL.WEIGHTS", "", GENERATOR_KEY, path, *overrides)
    model = seeded_model(cfg, 2)
    backbone_before = state_of(model.backbone)
    load(cfg, model)
    assert_equal(state_of(model.proposal_generator.network.trunk), trunk)
    assert_equal(state_of(model.backbone), backbone_before)


@pytest.mark.parametrize(
    ("change", "overrides", "part"),
    [
        (dict, ("MODEL.DEEPMASK.SHARED_TRUNK", False), "fit several networks"),
        (lambda x: {**x, "features.0.weight": torch.zeros(7)}, (), "is (7,) in"),
        (lambda x: {**x, "classifier.weight": torch.zeros(7)}, (), f"but {PART}.classifier.weight"),
        (lambda x: {"odd.weight": torch.zeros(7)}, (), f"has no entries '{PART}.*', but odd"),
    ],
)
def test_short_names_that_do_not_fit(change, overrides, part, tmp_path):
    path = write_short_names(tmp_path, change(deepmask_trunk()))
    cfg = host_cfg("DeepMask", "FasterRCNN", "MODEL.WEIGHTS", "", GENERATOR_KEY, path, *overrides)
    with pytest.raises(ValueError) as error:
        load(cfg, seeded_model(cfg, 2))
    message = str(error.value)
    assert part in message and path in message and GENERATOR_KEY in message and "\n" not in message


def test_a_half_loaded_part_is_not_there(tmp_path, caplog):
    """ImageNet weights in MODEL.WEIGHTS do not keep the parts' own from being evaluated."""
    source = seeded_model(host_cfg("SCRPN"), 1)
    pair = write(tmp_path / "pair.pth", state_of(source))
    other = state_of(seeded_model(host_cfg("SCRPN"), 2))
    half = {name: value for name, value in other.items() if name.startswith("backbone.bottom_up.")}
    half |= {name: value for name, value in other.items() if name.endswith("init_conv.weight")}
    image_net = write(tmp_path / "R-18.pth", half)
    cfg = host_cfg("SCRPN", "FasterRCNN", "MODEL.WEIGHTS", image_net)
    cfg.merge_from_list([BACKBONE_KEY, pair, GENERATOR_KEY, pair])
    with caplog.at_level(logging.WARNING, logger="d2proposals"):
        model = load_trained_model(cfg)
    assert_equal(model.backbone.state_dict(), source.backbone.state_dict())
    assert_equal(model.proposal_generator.state_dict(), source.proposal_generator.state_dict())
    assert messages_of(caplog) == []


@pytest.mark.parametrize("same_file", [True, False])
def test_a_key_that_is_not_read_is_spoken_of(same_file, tmp_path, caplog):
    state = state_of(seeded_model(host_cfg("SCRPN", "FasterRCNN"), 1))
    whole = write(tmp_path / "whole.pth", state)
    path = whole if same_file else str(tmp_path / "not_even_there.pth")
    cfg = host_cfg("SCRPN", "FasterRCNN", "MODEL.WEIGHTS", whole, BACKBONE_KEY, path)
    model = seeded_model(cfg, 2)
    checkpointer = ProposalCheckpointer(model)
    checkpointer.load(whole)
    # Counters of batch normalisation are no reason to read it.
    counters = {name for name in state if name.endswith("num_batches_tracked")}
    assert counters and not checkpointer.missing_keys
    checkpointer.missing_keys |= counters
    with caplog.at_level(logging.INFO, logger="d2proposals"):
        load_part_weights(cfg, checkpointer, only_missing=True)
    (record,) = [x for x in caplog.records if "is not read" in x.getMessage()]
    assert record.levelno == (logging.INFO if same_file else logging.WARNING)
    assert record.getMessage() == (
        f"{BACKBONE_KEY} ({path}) is not read: {whole} has the whole backbone."
    )
    assert_equal(state_of(model), state)


@pytest.mark.parametrize("kinds", [(), ("backbone",), ("backbone", PART)])
def test_random_weights_of_a_proposal_network_are_named(kinds, tmp_path, caplog):
    state = state_of(seeded_model(host_cfg("SCRPN"), 1))
    path = write(tmp_path / "pair.pth", {k: v for k, v in state.items() if "num_batches" not in k})
    keys = [x for kind in kinds for x in (f"MODEL.{kind.upper()}.WEIGHTS", path)]
    with caplog.at_level(logging.WARNING, logger="d2proposals"):
        load_trained_model(host_cfg("SCRPN", "ProposalNetwork", "MODEL.WEIGHTS", "", *keys))
    random = sorted({"backbone", PART} - set(kinds))
    expected = [f"results of random weights ({', '.join(random)})"] if random else []
    messages = messages_of(caplog)
    assert len(messages) == len(expected)
    assert all(part in message for part, message in zip(expected, messages, strict=True))


def test_what_is_not_learnt_is_not_called_random(caplog):
    cfg = host_cfg("SCRPN", "FasterRCNN", "MODEL.WEIGHTS", "")
    checkpointer = ProposalCheckpointer(build_model(cfg))
    checkpointer.missing_keys = {"backbone.stem.norm.num_batches_tracked"}
    with caplog.at_level(logging.WARNING, logger="d2proposals"):
        check_weights_are_whole(checkpointer, cfg)
    assert messages_of(caplog) == []


@pytest.mark.parametrize(
    ("source", "overrides", "fault"),
    [
        ("RPN", (), "it has no proposal_generator.head."),
        ("SCRPN", ("MODEL.SCRPN.HEAD_CHANNELS", 24), "as (24, "),
    ],
)
def test_weights_of_another_network_are_refused(source, overrides, fault, tmp_path):
    other = seeded_model(host_cfg(source, "ProposalNetwork", *overrides), 1)
    path = write(tmp_path / "other.pth", state_of(other))
    cfg = host_cfg("SCRPN", "ProposalNetwork", "MODEL.WEIGHTS", path)
    with pytest.raises(ValueError, match="would be random") as caught:
        load_trained_model(cfg)
    message = str(caught.value)
    assert message.startswith(f"{path} is of another network: it has ") and fault in message
    assert "MODEL.WEIGHTS" in message and "MODEL.PROPOSAL_GENERATOR.NAME (SCRPN)" in message


def test_weights_without_statistics_are_refused(tmp_path):
    """Of a batch normalisation, which are buffers."""
    state = state_of(seeded_model(host_cfg("SCRPN"), 1))
    kept = {name: value for name, value in state.items() if "running_mean" not in name}
    assert len(kept) < len(state)
    path = write(tmp_path / "weights.pth", kept)
    with pytest.raises(ValueError, match="it has no backbone.*running_mean, and .* be random"):
        load_trained_model(host_cfg("SCRPN", "ProposalNetwork", "MODEL.WEIGHTS", path))


def test_a_detector_without_its_heads_is_left_to_detectron2(tmp_path, caplog):
    # Whoever asks for its proposals needs no more.
    path = write(tmp_path / "network.pth", state_of(seeded_model(host_cfg("SCRPN"), 1)))
    with caplog.at_level(logging.WARNING, logger="d2proposals"):
        load_trained_model(host_cfg("SCRPN", "FasterRCNN", "MODEL.WEIGHTS", path))
    assert messages_of(caplog) == []


@pytest.mark.parametrize(
    ("generator", "host", "overrides", "norm_key"),
    [
        ("DeepMask", "FasterRCNN", (), "MODEL.VGG.NORM"),
        ("SPOP", "CascadeRCNN", (), "MODEL.SPOP.TRUNK.NORM"),
        ("DetectorNet", "FasterRCNN", (), "MODEL.DETECTORNET.NORM"),
        ("DeepMask", "FasterRCNN", ("MODEL.VGG.NORM", "BN"), None),
        ("SPOP", "FasterRCNN", ("MODEL.SPOP.TRUNK.NORM", "BN"), None),
        ("DetectorNet", "FasterRCNN", ("MODEL.DETECTORNET.NORM", "BN"), None),
        ("DeepMask", "FasterRCNN", ("MODEL.PROPOSAL_GENERATOR.FREEZE", True), None),
        ("DeepMask", "ProposalNetwork", (), "MODEL.VGG.NORM"),
        ("SCRPN", "FasterRCNN", (), None),
    ],
)
def test_a_generator_that_will_hardly_learn(generator, host, overrides, norm_key, tmp_path, caplog):
    cfg = host_cfg(generator, host, "MODEL.WEIGHTS", "", *overrides)
    with caplog.at_level(logging.WARNING, logger="d2proposals"):
        warn_of_random_generator(cfg, load(cfg, seeded_model(cfg, 1)))
    messages = messages_of(caplog)
    assert len(messages) == (norm_key is not None)
    assert all(f"The {generator} starts" in x and f"{norm_key} 'BN'" in x for x in messages)
    if norm_key is not None:  # which is possible
        build_model(host_cfg(generator, host, "MODEL.WEIGHTS", "", *overrides, norm_key, "BN"))
    if norm_key is None:
        return
    caplog.clear()
    cfg.merge_from_list([GENERATOR_KEY, write_trunk(tmp_path, generator)[0]])
    model = seeded_model(cfg, 1)
    with caplog.at_level(logging.ERROR, logger="d2proposals"):
        checkpointer = ProposalCheckpointer(model)
        load_part_weights(cfg, checkpointer)
    with caplog.at_level(logging.WARNING, logger="d2proposals"):
        warn_of_random_generator(cfg, checkpointer)
    assert messages_of(caplog) == []


@pytest.mark.parametrize(("norm", "is_warned"), [("FrozenBN", True), ("BN", False)])
def test_a_trunk_of_torchvision_has_its_own_key(norm, is_warned, caplog):
    cfg = make_cfg("photos/deepmask_mobilenet_v2.yaml", "MODEL.TORCHVISION.WEIGHTS", "")
    cfg.MODEL.TORCHVISION.NORM = norm
    with caplog.at_level(logging.WARNING, logger="d2proposals"):
        warn_of_random_generator(cfg, load(cfg, seeded_model(cfg, 1)))
    (message,) = messages_of(caplog) or [""]
    assert ("or set MODEL.TORCHVISION.NORM 'BN'" in message) == is_warned
    assert ("in MODEL.TORCHVISION.WEIGHTS or MODEL.PROP" in message) == is_warned


def test_the_trainer_warns_of_it_before_it_trains(tiny_coco, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "d2proposals.engine.trainer.warn_of_random_generator",
        lambda cfg, checkpointer: seen.append(len(checkpointer.missing_keys)),
    )
    trainer = Trainer(tiny_detector_cfg(tmp_path / "out"))
    trainer.resume_or_load(resume=True)
    assert seen == [len(trainer.model.state_dict())]
    trainer.checkpointer.save("model_final")
    trainer.resume_or_load(resume=True)
    assert len(seen) == 1
