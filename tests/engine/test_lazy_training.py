"""Jobs with lazy configurations: overrides, devices, training and evaluation."""

import os
import runpy
import sys
from argparse import Namespace

import pytest
import torch
from detectron2.config import instantiate
from detectron2.engine import default_argument_parser

from d2proposals.engine import lazy_training
from d2proposals.engine.lazy_training import load_lazy_config
from d2proposals.evaluation.coco_evaluator import SubsetCOCOEvaluator
from tests.common import CONFIGS, ROOT

RPN = ("--config-file", CONFIGS / "lazy/rpn_only.py")
TRAIN, VAL = (f"dataloader.{part}.dataset.names" for part in ("train", "test"))


def run_lazy(*arguments):
    """tools/train_lazy.py in this process."""
    command = runpy.run_path(str(ROOT / "tools" / "train_lazy.py"))
    return command["main"](default_argument_parser().parse_args([str(x) for x in arguments]))


@pytest.fixture
def narrow_file(tmp_path):
    """A lazy configuration of a user's own, of a narrow SC-RPN."""
    path = tmp_path / "narrow.py"
    path.write_text(
        "from tests.test_lazy_configs import load, make_narrow\n"
        "cfg = load('sc_rpn_only')\n"
        "model = make_narrow(cfg.model)\n"
        "dataloader, optimizer = cfg.dataloader, cfg.optimizer\n"
        "lr_multiplier, train = cfg.lr_multiplier, cfg.train\n"
        "dataloader.train.update(num_workers=0, total_batch_size=2)\n"
        "dataloader.test.num_workers = 0\n"
        "for part in (dataloader.train, dataloader.test):\n"
        "    part.mapper.augmentations[0].short_edge_length = [64]\n"
        "train.update(max_iter=2, init_checkpoint='', device='cpu')\n"
    )
    return path


def test_a_lazy_configuration_trains_resumes_and_is_evaluated_by_recall(
    tiny_coco, tmp_path, narrow_file, monkeypatch
):
    common = (
        *(f"{TRAIN}=tiny_train", f"{VAL}=tiny_val"),
        f"train.output_dir={tmp_path / 'out'}",
    )
    results = run_lazy("--config-file", narrow_file, *common)
    assert 0 <= results["box_proposals"]["AR@100"] <= 100
    weights = tmp_path / "out" / "model_final.pth"
    evaluated = run_lazy(
        "--config-file", narrow_file, "--eval-only", *common, f"train.init_checkpoint={weights}"
    )
    assert evaluated["box_proposals"] == results["box_proposals"]
    # Both datasets, and what several processes would be told.
    settings = []
    monkeypatch.setattr(
        lazy_training, "create_ddp_model", lambda model, **kw: settings.append(kw) or model
    )
    both = f"{TRAIN}=[tiny_train,tiny_val]"
    distributed = ("train.ddp.find_unused_parameters=True", "+train.ddp.static_graph=True")
    run_lazy(
        *("--config-file", narrow_file, "--resume", *common, both, "train.max_iter=3", *distributed)
    )
    assert settings == [
        {
            "broadcast_buffers": False,
            "find_unused_parameters": True,
            "fp16_compression": False,
            "static_graph": True,
            "device_ids": None,
        }
    ]
    checkpoint = torch.load(weights, weights_only=False)
    assert checkpoint["iteration"] == 2  # the third


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--config-file", "nowhere.py"), "nowhere.py is missing"),
        (("--config-file", CONFIGS / "sc_rpn_only.yaml"), "no lazy configuration"),
        (("--config-file", CONFIGS / "lazy/common/hosts.py"), "has no model, dataloader"),
        ((*RPN, "train.device", "cpu"), "KEY=VALUE"),
        ((*RPN, "+train.seed.value=1"), "KEY=VALUE of lazy configurations: "),
        ((*RPN, "train.output_dir=[1,"), "KEY=VALUE of lazy configurations: no viable"),
        ((*RPN, "train.max_iters=100"), "no train.max_iters. Did you mean train.max_iter"),
        ((*RPN, "model.proposal_generator.nms_tresh=1"), "generator.nms_thresh"),
        ((*RPN, "train.seed.value=1"), "has no train.seed.value"),
        ((*RPN, "train.max_iter=many"), r"train.max_iter is a number or .*, not 'many'"),
        ((*RPN, "train.amp.enabled=maybe"), "train.amp.enabled is a number or a truth value"),
        (
            (
                *RPN,
                "+model.proposal_generator.nms_tresh=1",
                f"{VAL}=d2p_shapes_val",
                f"{TRAIN}=d2p_shapes_val",
                "train.device=cpu",
            ),
            "model of the lazy configuration: .*unexpected keyword argument 'nms_tresh'",
        ),
        ((*RPN, f"{VAL}=[a,b]"), "one dataset, not .'a', 'b'"),
        ((*RPN, f"{VAL}=d2p_shapes_val", f"{TRAIN}=[b,a]"), "Unknown dataset 'b'"),
    ],
)
def test_a_wrong_lazy_job_is_one_line(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=words):
        run_lazy(*arguments)


@pytest.mark.parametrize("mode", [(), ("--eval-only",)])
def test_weights_that_are_not_there_have_the_lazy_key(mode, tiny_coco, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = (f"{VAL}=tiny_val", f"{TRAIN}=tiny_train")
    with pytest.raises(SystemExit, match="gone.pth is missing. Set train.init_checkpoint to"):
        run_lazy(*RPN, *mode, *names, "train.init_checkpoint=gone.pth")


def test_an_evaluation_refuses_weights_of_another_network(tiny_coco, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"backbone.other": torch.zeros(1)}}, "other.pth")
    weights = "train.init_checkpoint=other.pth"
    with pytest.raises(SystemExit, match="other.pth is of another network: .*train.init_checkp"):
        run_lazy(*RPN, "--eval-only", f"{VAL}=tiny_val", weights)


def test_overrides_of_a_lazy_configuration(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        "model = dict(names='???', link='${..train}')\n"
        "dataloader = dict(evaluators=[dict(limit=1)])\n"
        "optimizer, lr_multiplier, train = {}, {}, dict(none=None, max_iter=1)\n"
    )
    overrides = (
        *("model.names=coco", "dataloader.evaluators.0.limit=2", "train.none=3"),
        *("+train.own.key=4", "++train.max_iter=5"),
    )
    cfg = load_lazy_config(Namespace(config_file=str(path), opts=list(overrides)))
    assert cfg.model.names == "coco" and cfg.dataloader.evaluators[0].limit == 2
    assert cfg.train == {"none": 3, "own": {"key": 4}, "max_iter": 5}


def test_lazy_processes_on_the_cpu_see_no_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    invoke = runpy.run_path(str(ROOT / "tools" / "train_lazy.py"))["invoke"]
    jobs = []
    monkeypatch.setitem(invoke.__globals__, "run_processes", lambda main, args: jobs.append(args))
    command = ["train_lazy.py", *(str(x) for x in RPN), "--num-gpus", "3"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="--num-gpus 3, .* this machine has 2.*train.device=cpu"):
        invoke()
    assert not jobs and os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
    monkeypatch.setattr(sys, "argv", [*command, "train.device=cpu"])
    invoke()
    assert len(jobs) == 1 and os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_detections_are_measured_on_the_images_tested(tiny_coco):
    path = CONFIGS / "lazy" / "faster_rcnn_rpn.py"
    cfg = load_lazy_config(Namespace(config_file=str(path), opts=[f"{VAL}=tiny_val"]))
    (evaluator,) = cfg.dataloader.evaluators
    assert type(instantiate(evaluator)) is SubsetCOCOEvaluator
