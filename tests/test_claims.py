"""The tables behind docs/claims.md: each row's configuration builds and trains."""

from argparse import Namespace

import pytest
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from d2proposals.engine.experiment_tables import read_table
from d2proposals.engine.experiments import run_overrides
from d2proposals.engine.job import check_config, load_config
from tests.common import ROOT, leaf_keys, make_record

TABLES = sorted((ROOT / "docs" / "results").glob("claims_*.yaml"))
RUNS = [run for table in TABLES for run in read_table(table)]
TRAINED = {(run.table, run.row, run.seed): run for run in RUNS if not run.weights_of}
# Of the test alone: networks with other values have the same weights, trained in the same way.
OF_THE_TEST = {
    "MODEL.SCRPN.IOU_MASK.USE_AT_TEST",
    "MODEL.SCRPN.IOU_MASK.SCORE",
    "TEST.PROPOSALS.BOXES_AS_MASKS",
    "MODEL.DEEPMASK.LOG2_SCALES",
    "MODEL.ZIP.GRAY_CLASS.IN_SCORE",
    "MODEL.ZIP.LEVEL_BIAS",
    "MODEL.SPOP.SCALES",
    "MODEL.SPOP.REFINEMENT.ENABLED",
    "MODEL.DETECTORNET.NUM_SCALES",
    "MODEL.DETECTORNET.TOPK_PER_SCALE",
    "MODEL.DETECTORNET.REFINEMENT.ENABLED",
    "MODEL.DETECTORNET.HALVES_WEIGHT",
    # Another generator before the same heads, of which these proposals are not measured.
    "MODEL.PROPOSAL_GENERATOR.NAME",
    "TEST.PROPOSALS.OF_DETECTORS",
}
# Few patches and crops of an image.
FEW = ["MODEL.DEEPMASK.BATCH_SIZE_PER_IMAGE", 2, "MODEL.DETECTORNET.NUM_CROPS", 6]


def configuration(run, *overrides):
    """As the run has it, but for weights from the network."""
    overrides = ["MODEL.DEVICE", "cpu", *overrides, "MODEL.TORCHVISION.WEIGHTS", ""]
    overrides = run_overrides(run, "out", overrides)
    return load_config(Namespace(config_file=str(ROOT / run.config), opts=overrides))


def named(run):
    return f"{run.table}-{run.name}"


def has_own_model(run):
    """Whether it is another model than its configuration's, which tests/test_photos.py trains."""
    return any(key.startswith(("MODEL.", "INPUT.")) for key in run.overrides[::2])


@pytest.mark.parametrize("run", [*filter(has_own_model, TRAINED.values())], ids=named)
def test_a_row_that_is_trained_trains_a_step(run):
    cfg = configuration(run, *FEW)
    check_config(cfg)
    model = build_model(cfg).train()
    with EventStorage():
        losses = model([make_record((96, 128), [[8, 8, 70, 90], [80, 30, 124, 80]])])
    sum(losses.values()).backward()
    assert losses and all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("run", [run for run in RUNS if run.weights_of], ids=named)
def test_a_row_with_the_weights_of_another_differs_in_the_test_alone(run):
    cfgs = configuration(run), configuration(TRAINED[run.table, run.weights_of, run.seed])
    check_config(cfgs[0])
    own, others = (leaf_keys(cfg) for cfg in cfgs)
    differing = {key for key in own if own[key] != others[key]} - {"OUTPUT_DIR"}
    assert (differing or run.measures) and differing <= OF_THE_TEST


@pytest.mark.parametrize("table", TABLES, ids=lambda path: path.stem)
def test_rows_of_a_table_differ_in_what_they_say(table):
    runs = [run for run in RUNS if run.table == table.stem]
    cfgs = [configuration(run) for run in runs]
    for cfg in cfgs:
        # The page's budget: these two have the weights of photos_coco.yaml.
        iterations = {"claims_spop": 250, "claims_detectornet": 400}.get(table.stem, 600)
        falls = tuple(round(share * iterations) for share in (0.8, 0.95))
        assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == (iterations, falls)
        assert cfg.DATASETS.TEST == ("coco_2017_val",)
        assert not cfg.INPUT.USE_INSTANCE_MASK or cfg.DATASETS.TRAIN == ("coco_2017_train",)
        cfg.OUTPUT_DIR = ""
    differing = {(cfg.dump(), run.measures) for cfg, run in zip(cfgs, runs, strict=True)}
    assert len(differing) == len(runs) > 1


@pytest.mark.parametrize("table", TABLES, ids=lambda path: path.stem)
def test_the_page_has_the_table(table):
    assert f"results of docs/results/{table.name}:" in (ROOT / "docs/claims.md").read_text()
