"""Hosts that tell their generator how large images were before they were resized."""

import copy
import pickle

import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.structures import Boxes, Instances
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from d2proposals.backbones import ImageBackbone
from d2proposals.engine import Trainer, load_trained_model
from d2proposals.evaluation.export import proposal_network_of
from d2proposals.proposals.native_size import NativeSizes
from d2proposals.proposals.native_size_hosts import hand_over_native_sizes
from tests.test_contract import GENERATORS, host_cfg


class Recorder(nn.Module):
    """A generator without proposals that notes the native sizes it is told."""

    def __init__(self):
        super().__init__()
        self.native_sizes = NativeSizes("MODEL.X", short_edge=1)
        self.weight = nn.Parameter(torch.ones(1))
        self.seen = []

    def forward(self, images, features, gt_instances=None):
        self.seen.append(self.native_sizes(images.image_sizes))
        if not self.weight.isfinite():
            raise FloatingPointError
        proposals = [
            Instances(size, proposal_boxes=Boxes(torch.zeros(0, 4))) for size in images.image_sizes
        ]
        return proposals, {"loss": self.weight.sum()}


def build_host(generator=None):
    host = META_ARCH_REGISTRY.get("ProposalNetwork")(
        backbone=ImageBackbone(3),
        proposal_generator=generator or Recorder(),
        pixel_mean=[0.0] * 3,
        pixel_std=[1.0] * 3,
    )
    return hand_over_native_sizes(host).eval()


def make_inputs(*sizes):
    """Images twice as large as they were."""
    return [
        {"image": torch.zeros(3, 2 * height, 2 * width), "height": height, "width": width}
        for height, width in sizes
    ]


def test_each_batch_has_its_own_sizes():
    host = build_host()
    generator = host.proposal_generator
    host(make_inputs((8, 10), (12, 6)))
    host(batched_inputs=make_inputs((9, 9)))
    assert generator.seen == [[(8, 10), (12, 6)], [(9, 9)]]
    # In training, too.
    host.train()(make_inputs((7, 5)))
    assert generator.seen.pop() == [(7, 5)]


def test_no_size_outlives_its_batch():
    host = build_host()
    generator = host.proposal_generator
    images = make_inputs((8, 8))
    host(images)
    assert generator.native_sizes([(16, 16)]) == [(1, 1)]  # by the shorter side
    generator.weight.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError):
        host(images)
    assert generator.native_sizes([(16, 16)]) == [(1, 1)]
    with pytest.raises(KeyError):
        host([{"height": 8, "width": 8}])
    assert generator.native_sizes([(16, 16)]) == [(1, 1)]


def test_copies_tell_their_own_generator():
    host = build_host()
    for other in (copy.deepcopy(host), pickle.loads(pickle.dumps(host))):
        other(make_inputs((8, 6)))
        assert other.proposal_generator.seen == [[(8, 6)]]
        assert host.proposal_generator.seen == []
    # A host that another one runs in its forward pass, as a teacher.
    teacher = build_host()
    host.backbone.register_forward_hook(lambda *args: teacher(make_inputs((3, 3))) and None)
    host(make_inputs((8, 6)))
    assert teacher.proposal_generator.seen == [[(3, 3)]]
    assert host.proposal_generator.seen == [[(8, 6)]]


def test_the_hooks_are_installed_once_and_where_they_are_asked_for():
    host = build_host()
    hand_over_native_sizes(host)
    assert len(host._forward_pre_hooks) == len(host._forward_hooks) == 1
    deaf = Recorder()
    deaf.native_sizes = None
    assert not build_host(deaf)._forward_pre_hooks
    # Also in the middle of something else.
    wrapper = nn.Sequential(build_host())
    wrapper[0]._forward_pre_hooks.clear()
    wrapper[0]._forward_hooks.clear()
    hand_over_native_sizes(wrapper)(make_inputs((8, 6)))
    assert wrapper[0].proposal_generator.seen == [[(8, 6)]]


def test_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1
    )
    try:
        host = build_host().train()
        DistributedDataParallel(host)(make_inputs((8, 6)))["loss"].backward()
        assert host.proposal_generator.seen == [[(8, 6)]]
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("generator", [name for name in GENERATORS if name != "RPN"])
@pytest.mark.parametrize("build", [Trainer.build_model, load_trained_model])
def test_every_door_of_the_project_tells_the_sizes(generator, build):
    cfg = host_cfg(generator, "FasterRCNN")
    asks = generator in ("DeepMask", "SPOP")
    model = build(cfg)
    assert len(model._forward_pre_hooks) == asks
    # Of a detector, the network of its proposals.
    assert len(proposal_network_of(build_model(cfg))._forward_pre_hooks) == asks
