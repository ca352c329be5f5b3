"""The classifier's layers in the mask networks (Sec. 6): which goes where, and the command."""

import pytest
import torch
from detectron2.modeling import build_model

from d2proposals.detectornet.classifier_weights import reuse_classifier
from d2proposals.engine import ProposalCheckpointer
from tests.common import CONFIGS, make_cfg, run_tool

TINY = ["MODEL.DETECTORNET.WIDTH_FACTOR", "0.01"]


def make_model(config, *overrides):
    return build_model(make_cfg(config, *TINY, *overrides))


def test_every_mask_network_starts_as_the_classifier(tmp_path, capsys):
    torch.manual_seed(0)
    source, output = tmp_path / "classifier.pth", tmp_path / "reused.pth"
    baseline = make_model("detectornet_sliding_windows_voc.yaml")
    torch.save({"model": baseline.state_dict()}, source)
    run_tool("reuse_classifier", "--config-file", CONFIGS / "detectornet_voc.yaml",
             "--classifier", source, "--output", output, *TINY, "MODEL.DEVICE", "cpu",
             "MODEL.DETECTORNET.NETWORKS", "per_mask")  # fmt: skip
    assert "reused.pth: " in capsys.readouterr().out
    model = make_model("detectornet_voc.yaml", "MODEL.DETECTORNET.NETWORKS", "per_mask")
    heads = {k: v.clone() for k, v in model.state_dict().items() if ".networks." in k}
    checkpointer = ProposalCheckpointer(model)
    checkpointer.load(str(output))
    trunk = baseline.roi_heads.classifier.network.trunk.state_dict()
    assert len(model.proposal_generator.network.networks) == 5
    for index, network in enumerate(model.proposal_generator.network.networks):
        for key, value in network.trunk.state_dict().items():
            assert torch.equal(value, trunk[key])
        # The regression layers are new.
        name = f"proposal_generator.network.networks.{index}.output.weight"
        assert torch.equal(network.output.weight, heads[name])
        assert name in checkpointer.missing_keys
    for key, value in baseline.roi_heads.classifier.state_dict().items():
        assert torch.equal(model.roi_heads.classifier.state_dict()[key], value)
    # The output layers alone are left; nothing in the file is left over.
    assert {x.split(".")[-2] for x in checkpointer.missing_keys} == {"output"}
    assert set(torch.load(output)["model"]) <= set(model.state_dict())


def test_a_classifier_of_other_classes_and_one_of_the_generator():
    weights = make_model("detectornet_sliding_windows_voc.yaml").state_dict()
    other = make_model("detectornet_voc.yaml", "MODEL.ROI_HEADS.NUM_CLASSES", 3)
    copies = reuse_classifier(weights, other)
    assert "roi_heads.classifier.network.trunk.features.0.weight" in copies
    assert "roi_heads.classifier.network.output.weight" not in copies
    budget = ("MODEL.DETECTORNET.CLASSIFIER.PRUNING_BUDGET", 5)
    pruning = make_model("detectornet_voc.yaml", *budget)
    copies = reuse_classifier(weights, pruning)
    assert "proposal_generator.classifier.network.output.weight" in copies
    again = reuse_classifier(pruning.state_dict(), make_model("detectornet_rpn_only.yaml"))
    key = "proposal_generator.network.networks.4.trunk.features.0.weight"
    trunk = pruning.proposal_generator.classifier.network.trunk
    assert torch.equal(again[key], trunk.features[0].weight)


def test_what_does_not_fit_is_named():
    weights = make_model("detectornet_sliding_windows_voc.yaml").state_dict()
    with pytest.raises(ValueError, match="has no weights roi_heads.classifier"):
        reuse_classifier({"backbone.x": torch.zeros(1)}, make_model("detectornet_voc.yaml"))
    with pytest.raises(ValueError, match="has no mask network"):
        reuse_classifier(weights, make_model("detectornet_sliding_windows_voc.yaml"))
    wider = make_model("detectornet_voc.yaml", "MODEL.DETECTORNET.WIDTH_FACTOR", 0.25)
    with pytest.raises(ValueError, match="WIDTH_FACTOR, INPUT_SIZE and NORM must be the same"):
        reuse_classifier(weights, wider)


def test_the_output_is_a_pth_file(capsys):
    with pytest.raises(SystemExit):
        run_tool("reuse_classifier", "--config-file", CONFIGS / "detectornet_voc.yaml",
                 "--classifier", "a.pth", "--output", "b.pkl")  # fmt: skip
    assert "--output must end in .pth" in capsys.readouterr().err
