"""The tables behind docs/claims.md: each row's configuration builds and trains."""

from argparse import Namespace

import pytest
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from d2proposals.engine.experiments import read_table, run_overrides
from d2proposals.engine.job import check_config, load_config
from tests.common import ROOT, make_record

TABLES = sorted((ROOT / "docs" / "results").glob("claims_*.yaml"))
RUNS = [run for table in TABLES for run in read_table(table)]


def configuration(run, *overrides):
    """As the run has it, but for weights from the network."""
    overrides = run_overrides(run, "out", ["MODEL.DEVICE", "cpu", *overrides])
    overrides += ["MODEL.TORCHVISION.WEIGHTS", ""]
    return load_config(Namespace(config_file=str(ROOT / run.config), opts=overrides))


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.table}-{run.name}")
def test_each_row_builds_and_trains_a_step(run):
    cfg = configuration(run)
    check_config(cfg)
    model = build_model(cfg).train()
    with EventStorage():
        losses = model([make_record((96, 128), [[8, 8, 70, 90], [90, 30, 120, 60]])])
    sum(losses.values()).backward()
    assert losses and all(loss.isfinite() for loss in losses.values())
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == (600, (480, 570))
    # Rows of one table differ in what they say, not in what they see.
    assert cfg.DATASETS.TEST == ("coco_2017_val",)


@pytest.mark.parametrize(
    "runs", [[x for x in RUNS if x.table == t.stem] for t in TABLES], ids=[t.stem for t in TABLES]
)
def test_rows_of_a_table_are_different_models(runs):
    texts = {}
    for run in runs:
        cfg = configuration(run)
        cfg.OUTPUT_DIR = ""
        assert texts.setdefault(cfg.dump(), run.name) == run.name
