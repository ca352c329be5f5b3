import re
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from d2proposals.config import add_d2proposals_config
from d2proposals.engine import check_config
from tests.common import CONFIGS, make_cfg

FILES = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))
LEAVES = [name for name in FILES if not Path(name).name.startswith("Base-")]
PACKAGE = CONFIGS.parent / "d2proposals"


@pytest.mark.parametrize("name", FILES)
def test_bases_stay_below_configs_and_versions_are_set(name):
    cfg = make_cfg(name)
    assert cfg.VERSION == 2
    assert ".." not in (CONFIGS / name).resolve().relative_to(CONFIGS).parts


@pytest.mark.parametrize("name", LEAVES)
def test_every_configuration_builds_and_runs(name):
    cfg = make_cfg(name)
    check_config(cfg)
    model = build_model(cfg).eval()
    image = torch.randint(0, 256, (3, 96, 128)).float()
    with torch.no_grad():
        (output,) = model([{"image": image, "height": 96, "width": 128}])
    field = "proposals" if cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork" else "instances"
    assert output[field].image_size == (96, 128)


def leaf_keys(node, prefix=()):
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from leaf_keys(value, (*prefix, key))
        else:
            yield (*prefix, key)


def new_keys():
    from detectron2.config import get_cfg

    stock = set(leaf_keys(get_cfg()))
    cfg = get_cfg()
    add_d2proposals_config(cfg)
    return sorted(".".join(key) for key in leaf_keys(cfg) if key not in stock)


def test_every_new_key_is_read_and_explained():
    code = "\n".join(path.read_text() for path in PACKAGE.rglob("*.py") if path.name != "config.py")
    unread = [key for key in new_keys() if not re.search(rf"\.{key.split('.')[-1]}\b", code)]
    assert unread == []
    # A comment stands above each key, or above the first of a block of keys.
    lines = (PACKAGE / "config.py").read_text().splitlines()
    for above, line in zip(lines, lines[1:], strict=False):
        if re.match(r"\s+cfg\.[A-Z_.]+ = (?!CN)", line):
            assert re.match(r"\s+(#|cfg\.)", above), f"no comment above: {line.strip()}"


def test_the_paper_s_configuration_is_the_paper_s_network():
    cfg = make_cfg("zip_rpn_only.yaml")
    assert cfg.MODEL.BN_INCEPTION.WIDTH_FACTOR == 1.0
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES == [[16, 32], [64, 128], [256, 512]]  # Sec. 3.3
    assert cfg.MODEL.ZIP.POSITIVE_IOU == 0.6 and cfg.MODEL.ZIP.NEGATIVE_IOU == 0.25
    assert tuple(cfg.MODEL.ZIP.GRAY_CLASS.IOU) == (0.35, 0.55)
    assert (cfg.MODEL.ZIP.BATCH_SIZE_PER_IMAGE, cfg.MODEL.ZIP.BATCH_SIZE_PER_CLASS) == (300, 100)
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.GAMMA, cfg.SOLVER.WEIGHT_DECAY) == (1e-4, 0.5, 5e-4)
    assert cfg.SOLVER.STEPS[:2] == (7000, 14000)  # Sec. 5.1
    assert cfg.TEST.AUG.ENABLED and cfg.TEST.AUG.MIN_SIZES == (1000, 750, 500, 250)  # Sec. 3.4
    assert not cfg.TEST.AUG.FLIP and not cfg.MODEL.ZIP.LOW_QUALITY_MATCH
    assert (cfg.MODEL.ZIP.LEVEL_NMS_THRESH, cfg.MODEL.ZIP.LEVEL_NMS_TOPK) == (0.5, 2000)
