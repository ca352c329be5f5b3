"""The commands of docs/spop.md run, in the page's order, on tiny images and networks."""

import pytest

from d2proposals.spop.proposal_selection import select_proposals
from tests.common import ROOT
from tests.page_commands import read_commands, run_page

# Public weights of 80 MB and more, which tests/backbones/test_largefov_conversion.py makes small.
ELSEWHERE = {"tools/convert_weights.py"}
TINY = ["MODEL.DEVICE", "cpu", "MODEL.SPOP.TRUNK.WIDTH_FACTOR", "0.03125",
        "MODEL.SPOP.TRUNK.NORM", "", "MODEL.SPOP.HEAD_CHANNELS", "4", "INPUT.WARP_SIZE", "(40,40)",
        "MODEL.SPOP.PRE_NMS_TOPK_TEST", "40", "INPUT.MASK_FORMAT", "polygon",
        "DATALOADER.NUM_WORKERS", "0", "SOLVER.MAX_ITER", "1", "SOLVER.IMS_PER_BATCH", "2",
        "DATASETS.TRAIN", "('tiny_train',)", "DATASETS.TEST", "('tiny_val',)"]  # fmt: skip
REPEATS = {"tools/benchmark_spop.py": ["--repeats", "1"]}


def tiny(program, arguments):
    """The arguments with tiny settings behind the page's own."""
    arguments = [str(ROOT / x) if x.startswith("configs/") else x for x in arguments]
    return REPEATS.get(program, []) + arguments + TINY


@pytest.mark.usefixtures("tiny_coco")
def test_the_page_s_commands(tmp_path, monkeypatch, capsys):
    # benchmark_spop measures a function of this module, for good.
    monkeypatch.setattr("d2proposals.spop.generator.select_proposals", select_proposals)
    monkeypatch.chdir(tmp_path)
    commands, images = read_commands("spop.md"), ("street.jpg", "photo.jpg")
    programs = run_page(commands, tiny, ELSEWHERE, tmp_path, images)
    assert len(programs) > 12 and set(programs) == ELSEWHERE | {
        "train_net.py", "tools/evaluate_localization.py", "tools/plot_object_sizes.py",
        "tools/benchmark_spop.py", "tools/visualize_spop.py",
    }  # fmt: skip
    written = {str(x.relative_to(tmp_path)) for x in tmp_path.rglob("*") if x.is_file()}
    assert {"sizes.png", "spop.png"} <= written
    for folder in ("spop_rpn_only", "shapes/spop_rpn_only", "shapes/spop_single"):
        assert f"output/{folder}/model_final.pth" in written
    for folder in ("shapes/spop_s_sa", "shapes/spop_m_sa"):
        assert f"output/{folder}/inference/proposal_results.json" in written
    assert "Error" not in capsys.readouterr().err
