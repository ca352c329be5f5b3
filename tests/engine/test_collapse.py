"""Tests of d2proposals.engine.collapse."""

import logging
from types import SimpleNamespace

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn

from d2proposals.engine.collapse import CollapseWarner


class Head(nn.Module):
    """A ReLU map and the scores that are read from it, on several levels."""

    def __init__(self):
        super().__init__()
        self.map = nn.Conv2d(1, 4, 3, padding=1)
        self.scores = nn.Conv2d(4, 1, 1)

    def forward(self, levels):
        return [self.scores(self.map(x).relu()) for x in levels]


def look(model, inputs, hook=None, iteration=0):
    """One step of training under the hook; what it stored."""
    hook = hook or CollapseWarner(period=1)
    with EventStorage(iteration) as storage:
        hook.trainer = SimpleNamespace(model=model, iter=iteration, storage=storage)
        hook.before_step()
        model(inputs)
        hook.after_step()
        return {name: value for name, (value, _) in storage.latest().items()}


def images(*sizes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 1, size, size, generator=generator) for size in sizes]


@pytest.fixture
def head():
    torch.manual_seed(0)
    return Head()


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def test_a_dead_map_is_named_once(head, caplog):
    nn.init.constant_(head.map.bias, -100.0)
    hook = CollapseWarner(period=1)
    assert look(head, images(8, 4), hook)["collapse/constant_layers"] == 1
    look(head, images(8, 4), hook)
    (warning,) = warnings_of(caplog)
    assert "Iteration 1: the output of scores is the same at every position" in warning


def test_one_live_unit_at_one_level_is_enough(head, caplog):
    nn.init.constant_(head.map.bias, -100.0)
    levels = images(8, 4)
    levels[1][1, 0, 2, 2] = 1e6
    stored = look(head, levels)
    assert stored["collapse/constant_layers"] == 0
    # Of 2 * (64 + 16) positions, those within reach of the unit.
    assert stored["collapse/dead_positions"] >= 1 - 9 / 160
    (warning,) = warnings_of(caplog)
    assert "the same at every position" not in warning


def test_a_level_without_live_units_is_named_while_another_lives(head, caplog):
    # The first level, 64 of 80 positions of each image: no unit of the map is alive.
    nn.init.ones_(head.map.weight)
    levels = [torch.full_like(images(8)[0], -100.0), torch.rand(2, 1, 4, 4) + 1]
    hook = CollapseWarner(period=1)
    stored = look(head, levels, hook)
    assert stored["collapse/constant_layers"] == 0
    assert stored["collapse/dead_positions"] == pytest.approx(64 / 80)
    (warning,) = warnings_of(caplog)
    assert "the output of scores is its bias at more than half of the positions" in warning
    look(head, levels, hook)
    assert len(warnings_of(caplog)) == 1


def test_half_of_the_positions_may_be_dead(head, caplog):
    nn.init.ones_(head.map.weight)
    level = images(4)[0]
    stored = look(head, [torch.full_like(level, -100.0), torch.full_like(level, 1.0)])
    assert stored["collapse/dead_positions"] == pytest.approx(0.5)
    assert not warnings_of(caplog)


def test_levels_that_differ_are_not_constant(head):
    # Constant within each level, but not from one to the other.
    levels = [torch.full((1, 1, 1, 2), 5.0), torch.full((1, 1, 1, 2), 9.0)]
    model = nn.Sequential(nn.Conv2d(1, 1, 1))
    hook = CollapseWarner(period=1)
    with EventStorage(0) as storage:
        hook.trainer = SimpleNamespace(model=model, iter=0, storage=storage)
        hook.before_step()
        for level in levels:
            model(level)
        hook.after_step()
        assert storage.latest()["collapse/constant_layers"][0] == 0


@pytest.mark.parametrize("case", ["zero weights", "frozen", "one position", "no position"])
def test_what_tells_nothing_is_no_collapse(case, caplog):
    layer = nn.Linear(3, 2)
    inputs = torch.ones(4, 3)
    if case == "zero weights":
        nn.init.zeros_(layer.weight)
    elif case == "frozen":
        layer.requires_grad_(False)
    else:
        inputs = inputs[: case == "one position"]
    stored = look(layer, inputs)
    assert stored.get("collapse/constant_layers", 0) == 0
    assert stored.get("collapse/dead_positions", 0) == 0
    assert not warnings_of(caplog)
    if case == "zero weights":
        nn.init.ones_(layer.weight)
        assert look(layer, inputs)["collapse/constant_layers"] == 1


def test_it_looks_once_a_period_and_leaves_nothing_behind(head):
    hook = CollapseWarner(period=3)
    seen = [bool(look(head, images(4), hook, iteration)) for iteration in range(6)]
    assert seen == [False, False, True, False, False, True]
    assert not any(module._forward_hooks for module in head.modules())
    assert not look(head, images(4), CollapseWarner(period=0))
