"""Lazy configurations build what the YAML configurations of the same names build."""

import functools
import sys
import types
from argparse import Namespace

import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data import transforms as T
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.solver import LRMultiplier, build_lr_scheduler
from detectron2.utils.events import EventStorage
from omegaconf import ListConfig
from torch import nn
from torchvision.ops import MLP

from d2proposals.data.mapper import ProposalDatasetMapper
from d2proposals.engine.lazy_training import PARTS, load_lazy_config
from d2proposals.engine.optimizer import build_optimizer
from tests.common import CONFIGS, add_rectangle_masks, make_cfg, make_instances

NAMES = sorted(
    path.stem for path in (CONFIGS / "lazy").glob("*.py") if not path.stem.startswith("vitdet")
)
# Narrow versions of the YAML configurations' networks.
NARROW = (
    *("MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu"),
    *("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
    *("MODEL.FPN.OUT_CHANNELS", 16, "MODEL.SCRPN.HEAD_CHANNELS", 16, "MODEL.ZIP.HEAD_CHANNELS", 16),
    *("MODEL.BN_INCEPTION.WIDTH_FACTOR", 0.05, "MODEL.VGG.WIDTH_FACTOR", 0.0625),
    *("MODEL.DEEPMASK.MASK_CHANNELS", 16, "MODEL.DEEPMASK.CODE_DIM", 16),
    *("MODEL.DEEPMASK.SCORE_DIMS", (16, 16), "MODEL.SPOP.HEAD_CHANNELS", 16),
    *("MODEL.SPOP.TRUNK.WIDTH_FACTOR", 0.03, "MODEL.DETECTORNET.WIDTH_FACTOR", 0.03),
    *("MODEL.DETECTORNET.NUM_CROPS", 4, "MODEL.ROI_BOX_HEAD.FC_DIM", 16),
)
SIZE = (96, 128)
# Trained by AdaGrad or with each parameter's gradient clipped: in the YAML form alone.
OWN_STEPS = ("_spop", "spop_rpn_only", "detectornet_rpn_only")


def load(name):
    """The lazy configuration of this name."""
    return LazyConfig.load(str(CONFIGS / "lazy" / f"{name}.py"))


def make_narrow(model):
    """The same of a lazy configuration's model, in place."""
    bottom_up, generator = model.backbone.get("bottom_up"), model.proposal_generator
    if bottom_up is not None and "stages" in bottom_up:
        bottom_up.stages.depth = 18
        del bottom_up.stages["stride_in_1x1"]  # of blocks with a bottleneck
        model.backbone.out_channels = 16
        if "head" in generator:
            generator.head.in_channels = 16
        if "heads" in generator:
            generator.heads.in_channels = [16, 16, 16]
    elif bottom_up is not None:
        bottom_up.width_factor = 0.05
        shapes = instantiate(model.backbone).output_shape()
        generator.heads.in_channels = [shapes[name].channels for name in generator.in_features]
    if "channels" in generator.get("head", {}):
        generator.head.channels = 16
    if "heads" in generator:
        generator.heads.channels = 16
    network = generator.get("network", generator.get("networks", {}))
    if "mask_head" in network:
        network.trunk.width_factor = 0.0625
        network.mask_head.update(in_channels=32, channels=16, code_dim=16)
        network.score_head.update(in_channels=32, hidden_dims=(16, 16))
    if "confidence" in network:
        network.confidence.hidden_channels = 16
        for part in (network.confidence, *network.localization.values()):
            if isinstance(part, str):
                continue
            part.trunk.width_factor = 0.03
    if "make_trunk" in network:
        network.make_trunk.width_factor = 0.03
        generator.sampler.num_crops = 4
    for head in heads_of(model, "box_head"):
        head.update(input_shape=ShapeSpec(channels=16, height=7, width=7), fc_dims=[16, 16])
    for predictor in heads_of(model, "box_predictor"):
        predictor.input_shape = ShapeSpec(channels=16)
    return model


def heads_of(model, name):
    heads = model.get("roi_heads", {})
    return [heads[name]] if name in heads else list(heads.get(f"{name}s", []))


def settings_of(model):
    """Numbers and words that a model's modules and their helpers have as attributes."""
    found = {}

    def visit(prefix, value, depth):
        if isinstance(value, bool | int | float | str | None):
            found[prefix] = value
        elif isinstance(value, dict):
            for key, item in value.items():
                visit(f"{prefix}[{key}]", item, depth)
        elif hasattr(value, "_content") or isinstance(value, list | tuple):
            for i, item in enumerate(value):
                visit(f"{prefix}[{i}]", item, depth)
        elif type(value).__module__.startswith(("d2proposals", "detectron2")) and depth:
            for key, item in getattr(value, "__dict__", {}).items():
                if not key.startswith("_"):
                    visit(f"{prefix}.{key}", item, depth - 1)

    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if not key.startswith("_"):
                visit(f"{name}.{key}", value, 3)
    return found


def batch():
    generator = torch.Generator().manual_seed(0)
    boxes = [[10, 10, 60, 80], [30, 40, 110, 90]]
    return [
        {
            "image": torch.randint(0, 256, (3, *SIZE), dtype=torch.uint8, generator=generator),
            "instances": add_rectangle_masks(make_instances(SIZE, boxes_i)),
        }
        for boxes_i in (boxes, boxes[:1])
    ]


def losses_of(model, inputs):
    torch.manual_seed(1)
    with EventStorage(), torch.no_grad():
        return model.train()(inputs)


@pytest.mark.parametrize("name", NAMES)
def test_a_lazy_configuration_is_the_yaml_one(name):
    model = build_model(make_cfg(f"{name}.yaml", *NARROW))
    lazy = instantiate(make_narrow(load(name).model))
    # Also an equal number of classes, and everything else that has a shape.
    lazy.load_state_dict(model.state_dict())
    # A loss without a weight has the weight 1.
    expected, found = (
        {k: v for k, v in settings_of(x).items() if not ("loss_weight[" in k and v == 1)}
        for x in (model, lazy)
    )
    assert found == expected
    # A generator with a trunk of its own has shown its losses and proposals where it is alone.
    if not name.endswith(("_only", "_rpn", "_zip")):
        return
    losses = losses_of(model, batch())
    assert losses and all(x.isfinite() for x in losses.values())
    torch.testing.assert_close(losses_of(lazy, batch()), losses, rtol=0, atol=0)
    if not name.endswith("_only"):
        return
    inputs = [{"image": batch()[0]["image"]}]
    with torch.no_grad():
        (proposals,), (lazy_proposals,) = (x.eval()(inputs) for x in (model, lazy))
    proposals, lazy_proposals = proposals["proposals"], lazy_proposals["proposals"]
    assert len(proposals) > 0 or name == "detectornet_rpn_only"
    assert torch.equal(proposals.proposal_boxes.tensor, lazy_proposals.proposal_boxes.tensor)
    assert torch.equal(proposals.objectness_logits, lazy_proposals.objectness_logits)


def described(part, *but):
    """The class of a mapper or augmentation and its settings, without those named."""
    settings = {
        name: list(value) if isinstance(value, list | tuple | ListConfig) else value
        for name, value in vars(part).items()
        if name not in but
    }
    if "short_edge_length" in settings:
        settings["short_edge_length"] = set(settings["short_edge_length"])
    return type(part).__name__, settings


@pytest.mark.parametrize("name", NAMES)
def test_lazy_images_are_the_yaml_ones(name):
    cfg, loaders = make_cfg(f"{name}.yaml"), load(name).dataloader
    for is_train, loader in ((True, loaders.train), (False, loaders.test)):
        of_yaml, of_lazy = ProposalDatasetMapper(cfg, is_train), instantiate(loader.mapper)
        # dyTrainScale is the YAML form's alone.
        but = ("augmentations", "training_scale", "resize_index")
        assert described(of_lazy, *but) == described(of_yaml, *but)
        expected = [described(x) for x in of_yaml.augmentations.augs]
        # A resize to the side 0 is none.
        expected = [x for x in expected if x[1].get("short_edge_length") != {0}]
        assert [described(x) for x in of_lazy.augmentations.augs] == expected
    assert loaders.train.total_batch_size == cfg.SOLVER.IMS_PER_BATCH
    limits = loaders.proposal_evaluator.get("limits", (1, 10, 100, 300, 500, 1000))
    assert tuple(limits) == cfg.TEST.PROPOSALS.LIMITS


@pytest.mark.parametrize("name", NAMES)
def test_a_lazy_learning_rate_is_the_yaml_one(name):
    cfg, lazy = make_cfg(f"{name}.yaml"), load(name)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    of_yaml = build_lr_scheduler(cfg, optimizer)
    of_lazy = LRMultiplier(optimizer, instantiate(lazy.lr_multiplier), lazy.train.max_iter)
    iterations = {0, 1, cfg.SOLVER.WARMUP_ITERS // 2, cfg.SOLVER.WARMUP_ITERS}
    for step in (*cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER):
        iterations |= {step - 1, step}
    for iteration in sorted(iterations):
        of_yaml.last_epoch = of_lazy.last_epoch = iteration
        assert of_lazy.get_lr() == pytest.approx(of_yaml.get_lr(), rel=1e-9), iteration


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith(OWN_STEPS)])
def test_a_lazy_step_is_the_yaml_one(name):
    """Rates by module, momentum, weight decay and clipping, seen in what two steps do."""
    cfg, lazy = make_cfg(f"{name}.yaml"), load(name).optimizer
    results = []
    for build in (
        functools.partial(build_optimizer, cfg),
        lambda model: instantiate({**lazy, "params": instantiate({**lazy.params, "model": model})}),
    ):
        torch.manual_seed(0)
        model = nn.ModuleDict({"backbone": nn.Linear(3, 2), "proposal_generator": nn.Linear(3, 2)})
        model["norm"] = nn.BatchNorm1d(3)
        optimizer = build(model)
        for scale in (1.0, 40.0):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, scale)
            optimizer.step()
        results.append(model.state_dict())
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIGS / "lazy").glob("*.py")))
def test_every_lazy_configuration_is_one_of_a_training(name):
    path = CONFIGS / "lazy" / f"{name}.py"
    cfg = load_lazy_config(Namespace(config_file=str(path), opts=[]))
    assert set(PARTS) <= set(cfg)
    assert cfg.train.output_dir == f"./output/lazy/{name}"


@pytest.mark.parametrize("name", ["vitdet_rpn", "vitdet_sc_rpn"])
def test_images_of_vitdet_fit_the_square_they_are_padded_to(name):
    cfg = load(name)
    for loader in (cfg.dataloader.train, cfg.dataloader.test):
        augmentations = instantiate(loader.mapper).augmentations
        for side in (480, 427, 240):
            item = T.AugInput(np.zeros((side, 640, 3), np.uint8))
            augmentations(item)
            assert max(item.image.shape[:2]) <= cfg.model.backbone.square_pad
            assert min(item.image.shape[:2]) > side  # resized at all


def test_vitdet_takes_sc_rpn_in_one_line(monkeypatch):
    """Small, and with stand-ins for the two classes that Detectron2's ViT takes from timm."""
    timm = types.ModuleType("timm.models.layers")
    timm.DropPath = lambda p: nn.Identity()
    timm.Mlp = lambda in_features, hidden_features, act_layer: MLP(
        in_features, [hidden_features, in_features], activation_layer=act_layer
    )
    for name in ("timm", "timm.models", timm.__name__):
        monkeypatch.setitem(sys.modules, name, timm)
    hosts = load("vitdet_rpn"), load("vitdet_sc_rpn")
    rpn, sc_rpn = (cfg.model for cfg in hosts)
    usual = load("faster_rcnn_rpn").model.proposal_generator.post_nms_topk
    assert rpn.proposal_generator.post_nms_topk == usual
    clipping = [getattr(cfg.optimizer["_target_"], "func", None) for cfg in hosts]
    assert clipping[0] is None and clipping[1].__name__ == "FullModelClipping"
    # The norm's partial() is equal to itself only.
    del rpn.backbone.net["norm_layer"], sc_rpn.backbone.net["norm_layer"]
    assert {key for key in sc_rpn if sc_rpn[key] != rpn[key]} == {"proposal_generator"}
    net = sc_rpn.backbone.net
    net.update(depth=1, embed_dim=16, num_heads=2, img_size=64, window_block_indexes=[])
    sc_rpn.backbone.update(out_channels=16, square_pad=64)
    make_narrow(sc_rpn)
    sc_rpn.proposal_generator.head.in_channels = 16
    model = instantiate(sc_rpn)
    inputs = batch()
    for item in inputs:
        item["image"] = item["image"][:, :64, :64]
        item["instances"] = make_instances((64, 64), [[5, 5, 40, 50]])
    losses = losses_of(model, inputs)
    assert {"loss_scrpn_cls", "loss_cls"} <= set(losses)
    assert all(x.isfinite() for x in losses.values())
