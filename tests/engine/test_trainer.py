"""Tests of d2proposals.engine.trainer."""

import json

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluators
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.structures import BoxMode
from detectron2.utils.env import seed_all_rng

from d2proposals.data.size_grouping import SizeGroupedBatches
from d2proposals.engine import ProposalCheckpointer, Trainer
from d2proposals.evaluation import ProposalEvaluator
from tests.common import forgotten_datasets, make_cfg
from tests.engine.tiny_coco import SMALL, registered, write_tiny_coco

DATASETS = ("DATASETS.TRAIN", ("tiny_train",), "DATASETS.TEST", ("tiny_val",))


def tiny_cfg(output_dir, *overrides):
    cfg = make_cfg("shapes/rpn_only.yaml", *SMALL, *DATASETS, "OUTPUT_DIR", str(output_dir))
    cfg.merge_from_list(list(overrides))
    return cfg


def train(cfg, resume=False):
    seed_all_rng(cfg.SEED)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def read_metrics(output_dir):
    lines = (output_dir / "metrics.json").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_same_seed_same_losses(tiny_coco, tmp_path, monkeypatch):
    losses = {}
    for run in ("first", "second", "other_seed"):
        losses[run] = []
        write_metrics = Trainer.run_step

        def run_step(self, seen=losses[run], run_step=write_metrics):
            run_step(self)
            seen.append(self.storage.latest()["total_loss"][0])

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "run_step", run_step)
            overrides = ["DATALOADER.NUM_WORKERS", 2, "INPUT.DY_TRAIN_SCALE.ENABLED", True]
            overrides += ["INPUT.DY_TRAIN_SCALE.OBJECT_SIDE", (20, 40), "DATASETS.TEST", ()]
            overrides += ["SEED", 2 if run == "other_seed" else 1]
            train(tiny_cfg(tmp_path / run, *overrides))
    assert len(losses["first"]) == 2
    assert losses["first"] == losses["second"]
    assert losses["first"] != losses["other_seed"]


@pytest.mark.parametrize("grouped_batches", [1, 3])
def test_training_scale_s_batches_are_of_like_sizes(tiny_coco, tmp_path, grouped_batches):
    node = "INPUT.DY_TRAIN_SCALE"
    cfg = tiny_cfg(
        tmp_path, f"{node}.ENABLED", True, f"{node}.GROUPED_BATCHES", grouped_batches,
        f"{node}.OBJECT_SIDE", (20, 40), "SOLVER.IMS_PER_BATCH", 2,
    )  # fmt: skip
    loader = Trainer.build_train_loader(cfg)
    is_grouped = isinstance(loader, SizeGroupedBatches)
    assert is_grouped == (grouped_batches > 1)
    if is_grouped:
        assert (loader.batch_size, loader.buffer_size) == (2, 6)
    iterator = iter(loader)
    assert [len(next(iterator)) for _ in range(3)] == [2, 2, 2]


def test_train_evaluate_resume(tiny_coco, tmp_path):
    trainer = train(tiny_cfg(tmp_path / "out", "TEST.AUG.ENABLED", True))
    assert isinstance(trainer.checkpointer, ProposalCheckpointer)
    results = read_metrics(tmp_path / "out")[-1]
    # The evaluation and the augmented one after it both reach the writers.
    assert 0 <= results["box_proposals/AR@100"] <= 100
    assert 0 <= results["box_proposals_TTA/AR@100"] <= 100
    assert set(trainer._last_eval_results) == {"box_proposals", "box_proposals_TTA"}
    for folder in ("inference", "inference_TTA"):
        assert (tmp_path / "out" / folder / "box_proposals.pkl").is_file()
    assert not list((tmp_path / "out").glob("*partial*"))

    momentum = trainer.optimizer.state_dict()["state"][0]["momentum_buffer"].clone()
    again = tiny_cfg(tmp_path / "out", "SOLVER.MAX_ITER", 3)
    resumed = Trainer(again)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 2
    assert torch.equal(resumed.optimizer.state_dict()["state"][0]["momentum_buffer"], momentum)
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name]), name
    resumed.train()
    assert resumed.iter == 3
    assert [x["iteration"] for x in read_metrics(tmp_path / "out") if "lr" in x] == [1, 2]
    assert (tmp_path / "out" / "last_checkpoint").read_text() == "model_final.pth"


def test_infinite_loss_stops_and_keeps_the_last_checkpoint(tiny_coco, tmp_path, monkeypatch):
    cfg = tiny_cfg(tmp_path / "out", "SOLVER.MAX_ITER", 9, "SOLVER.CHECKPOINT_PERIOD", 1)
    run_step = Trainer.run_step

    def poisoned(self):
        if self.iter == 2:
            next(self.model.parameters()).data.fill_(float("nan"))
        run_step(self)

    monkeypatch.setattr(Trainer, "run_step", poisoned)
    # Detectron2's RPN notices infinite proposals itself; with finite ones the loss is checked.
    with pytest.raises(FloatingPointError):
        train(cfg)
    assert (tmp_path / "out" / "last_checkpoint").read_text() == "model_0000001.pth"
    state = torch.load(tmp_path / "out" / "model_0000001.pth", weights_only=True)["model"]
    assert all(x.isfinite().all() for x in state.values())


@pytest.mark.parametrize("fails_in", ["training", "test"])
def test_a_broken_image_loses_nothing_of_the_training(tmp_path, monkeypatch, fails_in):
    root = write_tiny_coco(tmp_path) / "coco"
    broken = root / ("train2017" if fails_in == "training" else "val2017") / "000000000002.jpg"
    whole = broken.read_bytes()
    steps = []

    def run_step(self, run_step=Trainer.run_step):
        if self.iter == 2 and not steps.count(2):
            broken.write_bytes(whole[:200])
        steps.append(self.iter)
        run_step(self)

    monkeypatch.setattr(Trainer, "run_step", run_step)
    overrides = ["SOLVER.MAX_ITER", 12, "DATALOADER.NUM_WORKERS", 0, "TEST.EVAL_PERIOD", 4]
    with registered(root):
        cfg = tiny_cfg(tmp_path / "out", *overrides)
        with pytest.raises(ValueError, match="000000000002.jpg cannot be read"):
            train(cfg)
        # The iteration that met it, or all of the one after which the test met it.
        done = steps[-1] - (fails_in == "training")
        assert done >= 1 and (fails_in == "training" or done == 3)
        last = (tmp_path / "out" / "last_checkpoint").read_text()
        assert last == f"model_{done:07d}.pth"
        # Another run in the same folder saves its own.
        before = (tmp_path / "out" / last).stat().st_mtime_ns
        broken.write_bytes(whole)
        steps.clear()
        with pytest.raises(ValueError, match="000000000002.jpg cannot be read"):
            train(cfg)
        assert (tmp_path / "out" / last).stat().st_mtime_ns > before
        broken.write_bytes(whole)
        resumed = train(cfg, resume=True)
    assert resumed.start_iter == done + 1
    assert steps.count(done) == 1 and steps[-1] == 11


def test_a_test_that_fails_behind_the_last_iteration_saves_nothing_twice(tmp_path, monkeypatch):
    root = write_tiny_coco(tmp_path) / "coco"
    broken = root / "val2017" / "000000000002.jpg"

    def run_step(self, run_step=Trainer.run_step):
        broken.write_bytes(b"broken")
        run_step(self)

    monkeypatch.setattr(Trainer, "run_step", run_step)
    with registered(root):
        with pytest.raises(ValueError, match="000000000002.jpg cannot be read"):
            train(tiny_cfg(tmp_path / "out", "SOLVER.MAX_ITER", 2, "DATALOADER.NUM_WORKERS", 0))
    assert [x.name for x in (tmp_path / "out").glob("*.pth")] == ["model_final.pth"]


def test_augmented_test_resizes_from_the_original_image(tiny_coco, tmp_path, monkeypatch):
    cfg = tiny_cfg(tmp_path / "out", "INPUT.MIN_SIZE_TEST", 16)
    seen = []
    test = Trainer.test.__func__

    def spy(cls, cfg, model, evaluators=None):
        seen.append(next(iter(cls.build_test_loader(cfg, "tiny_val")))[0]["image"].shape)
        return test(cls, cfg, model, evaluators)

    monkeypatch.setattr(Trainer, "test", classmethod(spy))
    results = Trainer.test_with_TTA(cfg, Trainer.build_model(cfg))
    assert list(results) == ["box_proposals_TTA"]
    assert [tuple(x) for x in seen] == [(3, 64, 80)]
    assert cfg.INPUT.MIN_SIZE_TEST == 16


def test_evaluators(tiny_coco, tmp_path, monkeypatch):
    cfg = tiny_cfg(tmp_path / "out")
    assert isinstance(Trainer.build_evaluator(cfg, "tiny_val"), ProposalEvaluator)

    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    made = []
    for name in ("SubsetCOCOEvaluator", "LVISEvaluator", "VOCEvaluator"):
        # Some need packages or files that are not here.
        monkeypatch.setattr(
            f"d2proposals.engine.trainer.{name}",
            lambda *args, name=name, **kwargs: made.append((name, args, kwargs)),
        )
    for evaluator_type in ("coco", "lvis", "pascal_voc"):
        name = f"some_{evaluator_type}"
        MetadataCatalog.get(name).set(evaluator_type=evaluator_type)
        assert isinstance(Trainer.build_evaluator(cfg, name), DatasetEvaluators)
        MetadataCatalog.remove(name)
    # A COCO-style file of VOC's objects: a year beside the type.
    MetadataCatalog.get("voc_as_coco").set(evaluator_type="coco", year=2007)
    Trainer.build_evaluator(cfg, "voc_as_coco")
    MetadataCatalog.remove("voc_as_coco")
    folder = {"output_dir": str(tmp_path / "out" / "inference")}
    assert made == [
        ("SubsetCOCOEvaluator", ("some_coco",), {**folder, "allow_cached_coco": False}),
        ("LVISEvaluator", ("some_lvis",), folder),
        ("VOCEvaluator", ("some_pascal_voc",), {}),
        ("VOCEvaluator", ("voc_as_coco",), {}),
    ]
    with pytest.raises(ValueError, match="'odd' has evaluator_type 'None'"):
        Trainer.build_evaluator(cfg, "odd")
    MetadataCatalog.remove("odd")


def test_a_dataset_that_changed_is_measured_as_it_is_now(tmp_path):
    """In the same folder, where an evaluator has left the file that it made of the dataset."""
    cfg = tiny_cfg(tmp_path, "MODEL.META_ARCHITECTURE", "GeneralizedRCNN")
    for x in (1, 30):
        item = {"bbox": [x, 2, 9, 8], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
        record = {"file_name": "a.png", "image_id": 1, "height": 40, "width": 60}
        with forgotten_datasets() as names:
            names.append("of_a_function")
            DatasetCatalog.register(names[0], lambda r={**record, "annotations": [item]}: [r])
            metadata = {"thing_classes": ["cat"], "evaluator_type": "coco"}
            MetadataCatalog.get(names[0]).set(**metadata)
            (evaluator,) = Trainer.build_evaluator(cfg, names[0])._evaluators
        ((_, annotation),) = evaluator._coco_api.anns.items()
        assert annotation["bbox"] == [x, 2, 9, 8]


def test_proposals_of_every_kind_of_two_stage_detector_are_evaluated(tmp_path, monkeypatch):
    class OwnRCNN(GeneralizedRCNN):
        pass

    monkeypatch.setitem(META_ARCH_REGISTRY._obj_map, "OwnRCNN", OwnRCNN)
    cfg = tiny_cfg(tmp_path, "TEST.PROPOSALS.OF_DETECTORS", True)
    two_stage = {"GeneralizedRCNN": True, "PanopticFPN": True, "OwnRCNN": True}
    for name, expected in {**two_stage, "ProposalNetwork": False, "RetinaNet": False}.items():
        cfg.MODEL.META_ARCHITECTURE = name
        assert Trainer.evaluates_proposals_of_detector(cfg) is expected, name
    cfg.merge_from_list(
        ["MODEL.META_ARCHITECTURE", "OwnRCNN", "TEST.PROPOSALS.OF_DETECTORS", False]
    )
    assert not Trainer.evaluates_proposals_of_detector(cfg)


def test_several_datasets_have_their_own_folders(tiny_coco, tmp_path):
    cfg = tiny_cfg(tmp_path / "out", "DATASETS.TEST", ("tiny_train", "tiny_val"))
    results = Trainer.test(cfg, Trainer.build_model(cfg))
    assert set(results) == {"tiny_train", "tiny_val"}
    for name in results:
        assert (tmp_path / "out" / "inference" / name / "box_proposals.pkl").is_file()


@pytest.mark.parametrize(("batch", "num_processes"), [(0, 1), (16, 3)])
def test_batch_must_split_over_the_processes(tmp_path, monkeypatch, batch, num_processes):
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: num_processes)
    cfg = tiny_cfg(tmp_path, "SOLVER.IMS_PER_BATCH", batch)
    with pytest.raises(ValueError, match=rf"\({batch}\).*number of processes \({num_processes}\)"):
        Trainer.build_train_loader(cfg)


def test_a_training_of_no_iterations_is_one_line(tiny_coco, tmp_path):
    with pytest.raises(ValueError, match="SOLVER.MAX_ITER is 0: there is nothing to train"):
        Trainer(tiny_cfg(tmp_path / "out", "SOLVER.MAX_ITER", 0))


def test_a_resume_that_does_not_fit_is_named_before_it_starts(tiny_coco, tmp_path):
    cfg = tiny_cfg(tmp_path, "SOLVER.MAX_ITER", 1)
    trainer = Trainer(cfg)
    before = trainer.checkpointer
    before.save("model_0000000", iteration=0)
    other = tiny_cfg(tmp_path, "SOLVER.OPTIMIZER", "AdaGrad")
    with pytest.raises(ValueError, match="another optimizer than SOLVER.OPTIMIZER 'AdaGrad'"):
        Trainer(other).resume_or_load(resume=True)
    other = tiny_cfg(tmp_path, "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[1.0]])
    with pytest.raises(ValueError, match=r"objectness_logits.* has the shape \(3,.*here \(1,"):
        Trainer(other).resume_or_load(resume=True)
    Trainer(cfg).resume_or_load(resume=True)
