"""The commands of train_net.py on pages whose jobs are too large to run: each trains a step."""

import pytest
import torch
from detectron2.engine import default_argument_parser
from detectron2.utils.events import EventStorage

from d2proposals.engine import Trainer, check_config, load_config
from tests.common import ROOT, TINY, make_record, precomputed
from tests.page_commands import read_commands
from tests.zip_rpn.boosting_file import write_boosting_file

PAGES = ("zip.md", "detectors.md")
COMMANDS = {
    page: [arguments for program, arguments in read_commands(page) if program == "train_net.py"]
    for page in PAGES
}
# Scores of random heads are low.
SMALL = [*TINY, "MODEL.DEVICE", "cpu", "MODEL.BACKBONE.WEIGHTS", "",
         "MODEL.PROPOSAL_GENERATOR.WEIGHTS", "",
         "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0]  # fmt: skip


def test_the_pages_have_commands():
    assert all(COMMANDS.values())


@pytest.mark.parametrize("arguments", sum(COMMANDS.values(), []), ids=" ".join)
def test_command_trains_a_step_or_evaluates_an_image(arguments, tmp_path, monkeypatch):
    write_boosting_file(tmp_path / "boosting.npz", channels=32)
    args = default_argument_parser().parse_args(arguments)
    args.config_file = str(ROOT / args.config_file)
    monkeypatch.chdir(tmp_path)
    cfg = load_config(args)
    cfg.merge_from_list(SMALL)
    check_config(cfg)
    torch.manual_seed(0)
    model = Trainer.build_model(cfg)
    record = make_record((64, 96), [[8, 8, 40, 56], [50, 10, 90, 40]]) | precomputed(cfg, 64, 96)
    if args.eval_only:
        with torch.no_grad():
            (output,) = model.eval()([record])
        (found,) = output.values()
        assert len(found) > 0
        return
    optimizer = Trainer.build_optimizer(cfg, model)
    trained = [x for group in optimizer.param_groups for x in group["params"]]
    with EventStorage():
        losses = model.train()([record])
    assert losses and all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert any(x.grad is not None and x.grad.any() for x in trained)
    optimizer.step()
    assert all(x.isfinite().all() for x in trained)
