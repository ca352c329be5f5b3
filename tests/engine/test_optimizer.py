"""Optimizers by name, learning rates by module."""

import pytest
import torch
from detectron2.solver import build_lr_scheduler
from detectron2.solver import build_optimizer as build_detectron2_optimizer
from torch import nn

from d2proposals.engine.optimizer import build_optimizer
from tests.common import make_cfg


def make_model() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4), nn.Linear(4, 2)))
    model[0].weight.requires_grad = False
    return model


def rates(optimizer, model) -> dict[str, float]:
    by_parameter = {p: g["lr"] for g in optimizer.param_groups for p in g["params"]}
    return {name: by_parameter.get(p) for name, p in model.named_parameters()}


def step(optimizer, model) -> list[torch.Tensor]:
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.5) if p.requires_grad else None
    optimizer.step()
    optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def test_sgd_steps_as_detectron2s():
    cfg = make_cfg(None, "SOLVER.WEIGHT_DECAY", 0.1, "SOLVER.BIAS_LR_FACTOR", 2.0)
    steps = []
    for build in (build_optimizer, build_detectron2_optimizer):
        torch.manual_seed(0)
        model = make_model()
        steps.append(step(build(cfg, model), model))
    for ours, theirs in zip(*steps, strict=True):
        assert torch.equal(ours, theirs)


def test_biases_have_a_weight_decay_of_their_own():
    cfg = make_cfg(None, "SOLVER.WEIGHT_DECAY", 0.1, "SOLVER.WEIGHT_DECAY_BIAS", 0.025)
    model = nn.Linear(2, 1)
    groups = build_optimizer(cfg, model).param_groups
    decays = {p: group["weight_decay"] for group in groups for p in group["params"]}
    assert (decays[model.weight], decays[model.bias]) == (0.1, 0.025)


def test_a_factor_is_that_of_a_module_not_of_names_that_begin_alike():
    model = nn.Module()
    model.new, model.newer = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    model.proposal_generators = nn.Linear(1, 1, bias=False)
    model.new.lr_factor = 10.0
    cfg = make_cfg(None, "SOLVER.BASE_LR", 0.2, "SOLVER.PROPOSAL_GENERATOR_LR_FACTOR", 0.5)
    assert rates(build_optimizer(cfg, model), model) == {
        "new.weight": 2.0,
        "newer.weight": 0.2,
        "proposal_generators.weight": 0.2,
    }


def test_the_innermost_factor_counts():
    model = make_model()
    model[1].lr_factor = 10.0
    model[1][1].lr_factor = 0.5
    optimizer = build_optimizer(make_cfg(None, "SOLVER.BASE_LR", 0.2), model)
    assert rates(optimizer, model) == {
        "0.weight": None,
        "0.bias": 0.2,
        "1.0.weight": 2.0,
        "1.0.bias": 2.0,
        "1.1.weight": 0.1,
        "1.1.bias": 0.1,
    }


def test_a_generator_has_a_factor_on_all_its_rates():
    model = nn.Module()
    model.backbone, model.proposal_generator = nn.Linear(1, 1, bias=False), make_model()
    model.proposal_generator[1].lr_factor = 10.0
    cfg = make_cfg(None, "SOLVER.BASE_LR", 0.2, "SOLVER.PROPOSAL_GENERATOR_LR_FACTOR", 0.5)
    assert rates(build_optimizer(cfg, model), model) == {
        "backbone.weight": 0.2,
        "proposal_generator.0.weight": None,
        "proposal_generator.0.bias": 0.1,
        "proposal_generator.1.0.weight": 1.0,
        "proposal_generator.1.0.bias": 1.0,
        "proposal_generator.1.1.weight": 1.0,
        "proposal_generator.1.1.bias": 1.0,
    }
    # Biases have theirs besides, as those of SPOP's new layers in DeepLab's training.
    cfg.SOLVER.BIAS_LR_FACTOR = 2.0
    with_biases = rates(build_optimizer(cfg, model), model)
    assert with_biases["proposal_generator.0.bias"] == pytest.approx(0.2)
    assert with_biases["proposal_generator.1.1.bias"] == pytest.approx(2.0)
    assert with_biases["proposal_generator.1.1.weight"] == pytest.approx(1.0)
    cfg.SOLVER.PROPOSAL_GENERATOR_LR_FACTOR = 0.0
    with pytest.raises(ValueError, match="PROPOSAL_GENERATOR_LR_FACTOR must be positive, got 0.0"):
        build_optimizer(cfg, model)


def test_adagrad_by_hand():
    """Duchi et al.: each step is lr * g / sqrt(sum of g^2)."""
    model = nn.Linear(1, 1, bias=False)
    before = model.weight.item()
    cfg = make_cfg(
        None, "SOLVER.OPTIMIZER", "AdaGrad", "SOLVER.BASE_LR", 0.1, "SOLVER.WEIGHT_DECAY", 0.0
    )
    optimizer = build_optimizer(cfg, model)
    assert isinstance(optimizer, torch.optim.Adagrad)
    (after,) = step(optimizer, model)  # two steps with gradient 0.5
    assert after.item() == pytest.approx(before - 0.1 * (1 + 0.5**0.5), abs=1e-6)


@pytest.mark.parametrize("name", ["SGD", "AdaGrad"])
def test_gradients_are_clipped(name):
    cfg = make_cfg(
        None,
        *("SOLVER.OPTIMIZER", name, "SOLVER.WEIGHT_DECAY", 0.0, "SOLVER.MOMENTUM", 0.0),
        *("SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.25),
    )
    model = make_model()
    step(build_optimizer(cfg, model), model)
    assert model[0].bias.grad.abs().max() == 0.25


def clipping(clip_type, value, norm_type=2.0):
    return make_cfg(
        None,
        *("SOLVER.WEIGHT_DECAY", 0.0, "SOLVER.MOMENTUM", 0.0, "SOLVER.BASE_LR", 1.0),
        *("SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", clip_type),
        *("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", value),
        *("SOLVER.CLIP_GRADIENTS.NORM_TYPE", norm_type),
    )


@pytest.mark.parametrize(
    ("clip_type", "value", "norm_type", "expected"),
    [
        # Gradients (3, 0) and 4, of a norm of 5 together, and a sum of 7.
        ("full_model", 10.0, 2.0, [3.0, 0.0, 4.0]),
        ("full_model", 2.5, 2.0, [1.5, 0.0, 2.0]),
        ("full_model", 3.5, 1.0, [1.5, 0.0, 2.0]),
        ("norm", 2.5, 2.0, [2.5, 0.0, 2.5]),
    ],
)
def test_all_parameters_are_clipped_together(clip_type, value, norm_type, expected):
    model = nn.Linear(2, 1)
    model.frozen = nn.Parameter(torch.zeros(1), requires_grad=False)
    before = torch.cat([model.weight.flatten(), model.bias]).detach()
    cfg = clipping(clip_type, value, norm_type)
    cfg.SOLVER.BIAS_LR_FACTOR = 2.0
    optimizer = build_optimizer(cfg, model)
    assert len(optimizer.param_groups) == 2
    model.weight.grad, model.bias.grad = torch.tensor([[3.0, 0.0]]), torch.tensor([4.0])
    optimizer.step()
    after = torch.cat([model.weight.flatten(), model.bias]).detach()
    rates = torch.tensor([1.0, 1.0, 2.0])
    torch.testing.assert_close(before - after, rates * torch.tensor(expected))


def test_gradients_are_clipped_when_their_scale_has_been_taken_back():
    model = nn.Linear(2, 1, bias=False)
    before = model.weight.detach().clone()
    optimizer = build_optimizer(clipping("full_model", 2.5), model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale((model.weight * torch.tensor([3.0, 4.0])).sum()).backward()
    scaler.step(optimizer)
    torch.testing.assert_close(before - model.weight.detach(), torch.tensor([[1.5, 2.0]]))


def test_a_clipping_optimizer_is_saved_and_scheduled():
    model = nn.Linear(2, 1)
    cfg = clipping("full_model", 2.5)
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    step(optimizer, model)
    scheduler.step()
    again = build_optimizer(cfg, model)
    again.load_state_dict(optimizer.state_dict())
    assert again.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


def test_wrong_clipping_is_named():
    with pytest.raises(ValueError, match=r"CLIP_TYPE must be one of \(.*\), got 'global'"):
        build_optimizer(clipping("global", 1.0), make_model())
    with pytest.raises(ValueError, match="CLIP_VALUE must be positive, got 0.0"):
        build_optimizer(clipping("full_model", 0.0), make_model())


def test_an_unknown_optimizer_is_named():
    with pytest.raises(ValueError, match="SOLVER.OPTIMIZER must be one of .* got 'Lion'"):
        build_optimizer(make_cfg(None, "SOLVER.OPTIMIZER", "Lion"), make_model())
