"""Tests of d2proposals.engine.job."""

import os

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from d2proposals.engine import (
    check_config,
    check_datasets,
    fit_to_device,
    launch_processes,
    load_config,
    prepare_launch,
    warn_of_frozen_random_norm,
)
from d2proposals.engine import job as job_module
from tests.common import make_cfg
from tests.engine.tiny_coco import make_args


def test_file_then_overrides():
    cfg = load_config(make_args("SOLVER.MAX_ITER", "7"))
    assert cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork"
    assert cfg.DATASETS.TRAIN == ("d2p_shapes_train",)
    assert cfg.SOLVER.MAX_ITER == 7


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (("MODEL.ZIPP.HEAD_CHANNELS", "3"), r"MODEL\.ZIPP\.HEAD_CHANNELS.*Did you mean MODEL\.ZIP"),
        (("SOLVER.MAX_ITERS", "3"), r"Did you mean SOLVER\.MAX_ITER"),
        (("SOLVER.MAX_ITER",), "odd length"),
        (("SOLVER.MAX_ITER", "many"), "SOLVER.MAX_ITER"),
    ],
)
def test_bad_override(opts, message):
    with pytest.raises(ValueError, match=f"^Overrides KEY VALUE: .*{message}"):
        load_config(make_args(*opts))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("VERSION: 2\nMODEL: {ZIPP: {HEAD_CHANNELS: 3}}", "MODEL.ZIPP.*Did you mean MODEL.ZIP"),
        ("VERSION: 2\nSOLVER: {MAX_ITER: many}", "SOLVER.MAX_ITER"),
        ("VERSION: 2\nSOLVER: [", "line 2, column 10 of .*bad.yaml: expected the node content"),
        (
            "MODEL:\n\tMASK_ON: True",
            "line 2, column 1 of .*bad.yaml: found character .*cannot start any token",
        ),
        ("_BASE_: gone.yaml", "gone.yaml"),
        ("", "it needs KEY: value lines, and is empty"),
        ("[1, 2]", "it needs KEY: value lines, and has a list"),
        ("_BASE_: empty.yaml", r"its _BASE_ .*empty\.yaml needs KEY: value lines, and is empty"),
        ("MODEL: 3", r"in .*bad\.yaml MODEL is no value but a node"),
        ("MODEL:\n#  DEVICE: cpu", "MODEL is no value but a node"),
        ("_BASE_: 3", "_BASE_ of .*bad.yaml is the path .* not 3"),
        ("_BASE_: bad.yaml", "_BASE_ leads back to .*bad.yaml"),
    ],
)
def test_bad_file(tmp_path, content, message):
    (tmp_path / "empty.yaml").touch()
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=rf"^Configuration file .*bad\.yaml: .*{message}"):
        load_config(make_args(config_file=str(file)))


def test_missing_file():
    with pytest.raises(FileNotFoundError, match=r"gone\.yaml is missing \(--config-file\)"):
        load_config(make_args(config_file="gone.yaml"))


@pytest.mark.parametrize(
    ("config", "opts", "named"),
    [
        ("shapes/zip_single_stage.yaml", (), "'RetinaNet'"),
        ("shapes/faster_rcnn_rpn.yaml", ("MODEL.KEYPOINT_ON", True), "with MODEL.KEYPOINT_ON"),
    ],
)
def test_what_cannot_be_augmented_is_named_before_the_training(config, opts, named):
    check_config(make_cfg(config, *opts))
    with pytest.raises(ValueError, match=f"^TEST.AUG.ENABLED is for .*{named}"):
        check_config(make_cfg(config, "TEST.AUG.ENABLED", True, *opts))
    check_config(make_cfg("shapes/faster_rcnn_rpn.yaml", "TEST.AUG.ENABLED", True))


def test_without_cuda_the_cpu_is_taken(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg = make_cfg(None, "SOLVER.AMP.ENABLED", True, "MODEL.DEVICE", "cuda")
    fit_to_device(cfg)
    assert cfg.MODEL.DEVICE == "cpu" and not cfg.SOLVER.AMP.ENABLED
    assert "No CUDA device" in caplog.text and "SOLVER.AMP.ENABLED needs CUDA" in caplog.text


def test_with_cuda_nothing_changes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cfg = make_cfg(None, "SOLVER.AMP.ENABLED", True, "MODEL.DEVICE", "cuda")
    fit_to_device(cfg)
    assert cfg.MODEL.DEVICE == "cuda" and cfg.SOLVER.AMP.ENABLED


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("MODEL.PROPOSAL_GENERATOR.NAME", "ZAP"),
            "Unknown MODEL.PROPOSAL_GENERATOR.NAME 'ZAP'.*RPN",
        ),
        (("MODEL.META_ARCHITECTURE", "X"), "Unknown MODEL.META_ARCHITECTURE 'X'.*ProposalNetwork"),
        (("MODEL.BACKBONE.NAME", "X"), "Unknown MODEL.BACKBONE.NAME 'X'.*build_resnet_backbone"),
        (("MODEL.META_ARCHITECTURE", "GeneralizedRCNN"), "PROPOSALS_IN_TRAINING must be True"),
        (
            ("MODEL.META_ARCHITECTURE", "PanopticFPN"),
            "PROPOSALS_IN_TRAINING must be True with MODEL.META_ARCHITECTURE 'PanopticFPN'",
        ),
        (("MODEL.DEVICE", "gpu"), "MODEL.DEVICE 'gpu' is no device: cpu, cuda or cuda:1"),
        (("INPUT.FORMAT", "XYZ"), "INPUT.FORMAT 'XYZ' is none: BGR or RGB"),
        (("MODEL.FPN.NORM", "XX"), "MODEL.FPN.NORM 'XX' is no normalisation"),
        (("INPUT.MIN_SIZE_TRAIN", ()), "INPUT.MIN_SIZE_TRAIN needs one length or more"),
        (("INPUT.MIN_SIZE_TEST", -5), r"got \(640, .* and -5"),
        (("SOLVER.BASE_LR", -0.1), "SOLVER.BASE_LR must be at least 0, got -0.1"),
        (("TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", ()), "TEST.AUG.MIN_SIZES is empty"),
        (("MODEL.PIXEL_STD", (1.0, 0.0, 1.0)), r"MODEL.PIXEL_STD .*each must be above 0"),
        (("SOLVER.CHECKPOINT_PERIOD", 0), "SOLVER.CHECKPOINT_PERIOD must be at least 1, got 0"),
        (
            ("MODEL.RPN.IN_FEATURES", ["p2", "p3"]),
            r"ANCHOR_GENERATOR.SIZES has 5 lists, and MODEL.RPN.IN_FEATURES has 2 .*\(p2, p3\)",
        ),
    ],
)
def test_bad_configuration(overrides, message):
    check_config(make_cfg("rpn_only.yaml"))
    with pytest.raises(ValueError, match=message):
        check_config(make_cfg("rpn_only.yaml", *overrides))


def test_unknown_dataset_gets_a_suggestion():
    with pytest.raises(ValueError, match="Unknown dataset 'coco_2017_trian'.*coco_2017_train"):
        check_datasets(("coco_2017_trian",))
    # Like no other name, of other tests' datasets neither.
    with pytest.raises(ValueError, match="d2p_shapes_train"):
        check_datasets(("xyzzy",))


@pytest.mark.parametrize("missing", ["annotations/instances_val2017.json", "val2017"])
def test_missing_dataset_files_are_named(tiny_coco, missing):
    check_datasets(("tiny_train", "tiny_val"))
    (tiny_coco / missing).rename(tiny_coco / "elsewhere")
    with pytest.raises(FileNotFoundError) as error:
        check_datasets(("tiny_train", "tiny_val"))
    message = str(error.value)
    assert f"Dataset 'tiny_val' needs {tiny_coco / missing}, which is missing." in message
    assert "DETECTRON2_DATASETS" in message
    assert "configs/shapes/ need no download" in message


def test_a_file_and_a_folder_that_are_exchanged_are_named(tiny_coco):
    metadata = MetadataCatalog.get("tiny_val")
    folder, file = metadata.image_root, metadata.json_file
    del metadata.image_root, metadata.json_file
    metadata.set(image_root=file, json_file=folder)
    line = f"{folder} is a folder and {file} is a file.*in this order: .name, file, folder."
    with pytest.raises(ValueError, match=line):
        check_datasets(("tiny_train", "tiny_val"))


def test_dataset_that_makes_its_files_is_asked_to(tmp_path):
    file = tmp_path / "made.json"

    def make():
        file.write_text("{}")
        return []

    DatasetCatalog.register("makes_itself", make)
    MetadataCatalog.get("makes_itself").set(json_file=str(file))
    try:
        check_datasets(("makes_itself",))
    finally:
        DatasetCatalog.remove("makes_itself")
        MetadataCatalog.remove("makes_itself")
    assert file.exists()


def test_launch_on_the_cpu_sees_no_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    args = make_args("MODEL.DEVICE", "cuda")
    args.num_gpus = 2
    prepare_launch(args)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
    args.num_gpus = 3
    with pytest.raises(ValueError, match="--num-gpus 3, but this machine has 2"):
        prepare_launch(args)
    args.opts += ["MODEL.DEVICE", "cpu"]
    prepare_launch(args)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize(
    ("processes", "setting", "expected"),
    [(2, None, [4]), (16, None, [1]), (1, None, []), (2, "3", [])],
)
def test_processes_share_the_cores(processes, setting, expected, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if setting:
        monkeypatch.setenv("OMP_NUM_THREADS", setting)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    # As one of the processes that Detectron2 starts.
    monkeypatch.setattr(job_module, "launch", lambda main, number, args: main(*args))
    jobs = []
    launch_processes(jobs.append, "arguments", processes)
    assert jobs == ["arguments"] and threads == expected


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        ([], ["MODEL.ZOOM_NETWORK.NORM", "MODEL.BN_INCEPTION.NORM"]),
        (["MODEL.BN_INCEPTION.NORM", "GN"], ["MODEL.ZOOM_NETWORK.NORM"]),
        (["MODEL.BN_INCEPTION.NORM", "GN", "MODEL.ZOOM_NETWORK.NORM", "GN"], []),
        (
            ["MODEL.BN_INCEPTION.NORM", "GN", "MODEL.ZOOM_NETWORK.NORM", "GN"]
            + ["MODEL.ROI_HEADS.NAME", "ZIPHeads"],
            ["MODEL.ZIP_DETECTOR.NORM"],
        ),
        (["MODEL.WEIGHTS", "some.pkl"], []),
        (["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"], ["MODEL.RESNETS.NORM"]),
        (
            ["MODEL.BACKBONE.NAME", "build_torchvision_fpn_backbone"],
            ["MODEL.TORCHVISION.NORM"],
        ),
        (
            ["MODEL.BACKBONE.NAME", "build_torchvision_fpn_backbone"]
            + ["MODEL.TORCHVISION.WEIGHTS", "IMAGENET1K_V1"],
            [],
        ),
    ],
)
def test_random_weights_with_frozen_normalisation_are_warned_of(overrides, keys, caplog):
    with caplog.at_level("WARNING"):
        warn_of_frozen_random_norm(make_cfg("zip_rpn_only.yaml", *overrides))
    messages = [r.message for r in caplog.records if "normalises nothing" in r.message]
    assert len(messages) == bool(keys)
    assert all(key in message for key in keys for message in messages)
