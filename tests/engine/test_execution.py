"""Tests of d2proposals.engine.execution: the same numbers, computed otherwise."""

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.modeling.proposal_generator import RPN
from detectron2.utils.events import EventStorage
from torch._dynamo.utils import counters

from d2proposals.engine import check_config, load_trained_model, prepare_execution
from d2proposals.engine.loss_rpn import LossRPN
from d2proposals.evaluation.agreement import compare_runs
from tests.common import make_cfg
from tests.test_contract import BOXES, host_cfg, make_batch

FROZEN_BN = ("MODEL.RESNETS.NORM", "FrozenBN")
AS_BUILT = ("MODEL.EXECUTION.MEMORY_FORMAT", "contiguous",
            "MODEL.EXECUTION.FOLD_FROZEN_NORM", False)  # fmt: skip

CHANNELS_LAST = ("MODEL.EXECUTION.MEMORY_FORMAT", "channels_last")


def model_of(generator, host="ProposalNetwork", *overrides, prepared=True):
    """A model whose frozen statistics are not trivial."""
    cfg = host_cfg(generator, host, *FROZEN_BN, *overrides)
    torch.manual_seed(0)
    model = build_model(cfg)
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.bias.normal_(std=0.1)
    return prepare_execution(cfg, model) if prepared else model


def training_pass(model):
    """Losses and gradients of one batch."""
    model.train()
    batch = make_batch(BOXES, BOXES[:1])
    with EventStorage():
        torch.manual_seed(0)
        losses = model(batch)
    sum(losses.values()).backward()
    gradients = {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}
    return {name: loss.detach() for name, loss in losses.items()}, gradients


# Not within detectors: which proposals their heads see can hang on a rounded digit.
@pytest.mark.parametrize("generator", ["RPN", "SCRPN"])
def test_losses_and_gradients_are_those_of_the_model_as_built(generator):
    losses, gradients = training_pass(model_of(generator, "ProposalNetwork", *CHANNELS_LAST))
    expected_losses, expected = training_pass(model_of(generator, prepared=False))
    assert losses.keys() == expected_losses.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected_losses[name], rtol=1e-5, atol=1e-6)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("layout", [CHANNELS_LAST, ()], ids=["channels_last", "auto"])
@pytest.mark.parametrize(
    ("generator", "overrides"),
    # DeepMask's trunk has normalisation to fold, and is computed layer by layer.
    [("RPN", ()), ("SCRPN", ()), ("ZIP", ()), ("DeepMask", ("MODEL.VGG.NORM", "FrozenBN"))],
)
def test_proposals_are_those_of_the_model_as_built(generator, overrides, layout):
    batch = [{"image": x["image"]} for x in make_batch(BOXES, BOXES[:1])]
    models = [
        model_of(generator, "ProposalNetwork", *overrides, *layout, prepared=is_prepared)
        for is_prepared in (True, False)
    ]
    with torch.no_grad():
        got, expected = ([x["proposals"] for x in model.eval()(batch)] for model in models)
    for one, other in zip(got, expected, strict=True):
        scale = other.objectness_logits.abs().max().item()
        assert len(other) > 100 and scale > 0.1
        for agreement in (compare_runs(one, other), compare_runs(other, one)):
            # Of two nearly equal scores, another may be the last one or survive suppression.
            assert agreement.found >= 0.99
            # Within 6e-6 on two processors; others add up in other orders.
            assert agreement.score_difference <= 5e-5 * scale


@pytest.mark.parametrize("norm", ["GN", "FrozenBN"])
def test_the_zoom_network_trains_in_either_layout(norm):
    losses = []
    for overrides in (CHANNELS_LAST, AS_BUILT):
        cfg = make_cfg(
            "shapes/zip_rpn_only.yaml", "MODEL.ZOOM_NETWORK.NORM", norm, "MODEL.BN_INCEPTION.NORM",
            norm, "MODEL.BN_INCEPTION.WIDTH_FACTOR", 0.125, *overrides,
        )  # fmt: skip
        torch.manual_seed(0)
        losses.append(training_pass(prepare_execution(cfg, build_model(cfg)))[0])
    for name, loss in losses[0].items():
        torch.testing.assert_close(loss, losses[1][name], rtol=1e-5, atol=1e-6)


def layouts(model, part):
    """Layouts of the images that a part of the backbone gets, its maps and its weights."""
    seen = []
    part.register_forward_hook(lambda module, args, maps: seen.append((args[0], maps)))
    with torch.no_grad():
        model.eval()([{"image": torch.zeros(3, 70, 90)}])
    images, maps = seen[0]
    weight = next(x for x in part.parameters() if x.dim() == 4 and x.shape[1] > 1 < x.shape[2])
    return [is_channels_last(x) for x in (images, list(maps.values())[0], weight)]


def is_channels_last(x):
    assert not (x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last))
    return x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("auto", False), ("channels_last", True), ("contiguous", False)],
)
def test_layout_of_dense_convolutions(name, expected):
    model = model_of("RPN", "ProposalNetwork", "MODEL.EXECUTION.MEMORY_FORMAT", name)
    assert layouts(model, model.backbone) == [expected] * 3


DEPTHWISE = ("MODEL.BACKBONE.NAME", "build_torchvision_fpn_backbone",
             "MODEL.TORCHVISION.NAME", "mobilenet_v2", "MODEL.TORCHVISION.WEIGHTS", "",
             "MODEL.TORCHVISION.NORM", "FrozenBN",
             "MODEL.TORCHVISION.OUT_FEATURES", ["stride4", "stride8", "stride16", "stride32"],
             "MODEL.FPN.IN_FEATURES", ["stride4", "stride8", "stride16", "stride32"])  # fmt: skip


def test_auto_is_channels_last_within_a_depthwise_trunk():
    model = model_of("RPN", "ProposalNetwork", *DEPTHWISE)
    assert layouts(model, model.backbone.bottom_up) == [True, False, True]
    assert layouts(model, model.backbone)[1:] == [False, False]


def test_a_depthwise_trunk_learns_the_same():
    models = [model_of("RPN", "ProposalNetwork", *DEPTHWISE, prepared=x) for x in (True, False)]
    (losses, gradients), (expected_losses, expected) = map(training_pass, models)
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected_losses[name], rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-3 * scale)


def test_generators_that_read_images_get_them_as_they_are():
    model = model_of("SPOP")
    seen = []
    model.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model.eval()([{"image": torch.zeros(3, 70, 90)}])
    assert seen[0].is_contiguous()


def test_names_in_checkpoints_stay():
    prepared = model_of("RPN").state_dict()
    as_built = model_of("RPN", "ProposalNetwork", *AS_BUILT).state_dict()
    assert list(prepared) == list(as_built)


def test_a_loaded_model_is_prepared():
    cfg = host_cfg(
        "RPN", "ProposalNetwork", "MODEL.WEIGHTS", "", "MODEL.EXECUTION.MEMORY_FORMAT",
        "channels_last",
    )  # fmt: skip
    model = load_trained_model(cfg)
    assert layouts(model, model.backbone) == [True] * 3


def test_proposals_that_nobody_reads_are_not_made():
    model = model_of("RPN").train()
    assert type(model.proposal_generator) is LossRPN
    made = []
    model.proposal_generator.register_forward_hook(lambda module, args, out: made.extend(out[0]))
    with EventStorage():
        model(make_batch(BOXES, BOXES[:1]))
    assert [len(x) for x in made] == [0, 0]
    # A detector's heads read them.
    detector = model_of("RPN", "FasterRCNN")
    assert type(detector.proposal_generator) is RPN


@pytest.mark.parametrize("conv_dims", [[-1], [-1, -1]])
def test_rpn_predicts_at_its_samples_what_detectron2_s_does(conv_dims, monkeypatch):
    """Two hidden convolutions are computed everywhere."""
    dims = ("MODEL.RPN.CONV_DIMS", conv_dims)
    prepared = model_of("RPN", "ProposalNetwork", *dims, *AS_BUILT)
    computed, head = [], prepared.proposal_generator.rpn_head
    forward = head.forward
    with monkeypatch.context() as patch:
        patch.setattr(head, "forward", lambda x: computed.append(1) or forward(x))
        losses, gradients = training_pass(prepared)
        assert len(computed) == len(conv_dims) - 1
        # Whoever watches a part of it sees all cells.
        handle = head.objectness_logits.register_forward_hook(lambda *_: None)
        training_pass(prepared)
        handle.remove()
    assert len(computed) == len(conv_dims)
    expected_losses, expected = training_pass(
        model_of("RPN", "ProposalNetwork", *dims, prepared=False)
    )
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected_losses[name], rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5 * scale)


def test_unknown_layouts_are_named():
    with pytest.raises(ValueError, match="MEMORY_FORMAT must be one of auto, channels_last"):
        check_config(host_cfg("RPN", "ProposalNetwork", "MODEL.EXECUTION.MEMORY_FORMAT", "nhwc"))


COMPILED = ("MODEL.EXECUTION.COMPILE", ("backbone", "heads"),
            "MODEL.EXECUTION.COMPILE_BACKEND", "eager")  # fmt: skip


@pytest.fixture
def compile_counters():
    """torch.compile's counters, from nothing on."""
    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("generator", "host", "num_graphs"),
    # Of the first image: two of the backbone, one of RPN's head, four of SC-RPN's first stage,
    # whose layers take one map after the other.
    [("RPN", "ProposalNetwork", 3), ("SCRPN", "ProposalNetwork", 6)],
)
def test_compiled_parts_are_whole_graphs_with_the_same_proposals(
    compile_counters, generator, host, num_graphs
):
    model = model_of(generator, host, *COMPILED).eval()
    expected = model_of(generator, host).eval()
    assert model.state_dict().keys() == expected.state_dict().keys()
    batch = [{"image": x["image"]} for x in make_batch(BOXES)]
    with torch.no_grad():
        (found,), (other,) = model(batch), expected(batch)
    assert dict(compile_counters["graph_break"]) == {}
    # Fewer where the process has met such a layer before.
    assert 0 < compile_counters["stats"]["unique_graphs"] <= num_graphs
    (found,), (other,) = found.values(), other.values()
    assert len(found) == len(other)
    key = "proposal_boxes" if host == "ProposalNetwork" else "pred_boxes"
    torch.testing.assert_close(found.get(key).tensor, other.get(key).tensor, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("MODEL.EXECUTION.COMPILE", ("trunk",)), "out of backbone, heads, not 'trunk'"),
        ((*COMPILED[:2], "MODEL.EXECUTION.COMPILE_BACKEND", "nvcc"), "'nvcc' is none of"),
    ],
)
def test_unknown_parts_and_backends_are_named(overrides, words):
    with pytest.raises(ValueError, match=words):
        check_config(make_cfg("rpn_only.yaml", *overrides))


def test_a_generator_without_heads_says_so():
    with pytest.raises(ValueError, match="DeepMask computes on no feature maps"):
        model_of("DeepMask", "ProposalNetwork", *COMPILED)
