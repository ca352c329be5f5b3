"""Tests of d2proposals.engine.bad_input."""

import errno
import logging

import numpy as np
import pytest
from torch import nn
from torch.utils.data import DataLoader

from d2proposals.data.mapper import ProposalDatasetMapper
from d2proposals.data.training_scale import measurable_boxes
from d2proposals.engine import ProposalCheckpointer, bad_input_in_one_line, check_datasets
from tests.common import make_cfg


def test_the_packages_own_errors_become_one_line():
    with pytest.raises(SystemExit) as stop, bad_input_in_one_line():
        check_datasets(("mine",))
    assert str(stop.value).startswith("Error: Unknown dataset 'mine'")
    assert "\n" not in str(stop.value)


def test_missing_files_become_one_line():
    with pytest.raises(SystemExit, match="Error: Checkpoint gone.pth"), bad_input_in_one_line():
        ProposalCheckpointer(nn.Linear(1, 1), "").load("gone.pth")


def test_other_errors_keep_their_traceback():
    # Raised by numpy within the package, not by a raise statement of the package.
    with pytest.raises(ValueError, match="reshape"), bad_input_in_one_line():
        measurable_boxes(np.zeros(3), (10, 10))
    with pytest.raises(ValueError, match="here"), bad_input_in_one_line():
        raise ValueError("here")
    with pytest.raises(AssertionError), bad_input_in_one_line():
        raise AssertionError


def test_a_full_disk_becomes_one_line_whoever_fills_it():
    for number in (errno.ENOSPC, errno.EDQUOT):
        with pytest.raises(SystemExit, match="Error: log.txt cannot be written.*make room"):
            with bad_input_in_one_line():
                raise OSError(number, "No room", "log.txt")
    with pytest.raises(PermissionError), bad_input_in_one_line():
        raise PermissionError(errno.EACCES, "Permission denied", "log.txt")


def test_errors_of_data_loader_workers_become_one_line():
    dataset = [{"file_name": "gone.jpg"}]
    mapper = ProposalDatasetMapper(make_cfg(), False)
    loader = DataLoader(dataset, batch_size=None, num_workers=1, collate_fn=mapper)
    with pytest.raises(SystemExit) as stop, bad_input_in_one_line():
        next(iter(loader))
    assert str(stop.value).startswith("Error: Image file gone.jpg is missing")
    assert "\n" not in str(stop.value) and "Traceback" not in str(stop.value)


def test_other_errors_of_workers_keep_their_traceback():
    loader = DataLoader(
        [np.zeros(3)],
        batch_size=None,
        num_workers=1,
        collate_fn=lambda x: measurable_boxes(x, (1, 1)),
    )
    with pytest.raises(ValueError, match="Traceback"), bad_input_in_one_line():
        next(iter(loader))


def test_loss_that_became_infinite_becomes_one_line():
    with pytest.raises(SystemExit) as stop, bad_input_in_one_line():
        raise FloatingPointError(
            "Loss became infinite or NaN at iteration=3!\nloss_dict = {'a': nan}"
        )
    assert (
        "iteration=3! loss_dict = {'a': nan} Lower the learning rate (SOLVER.BASE_LR; of a lazy"
        in str(stop.value)
    )


def test_training_loops_log_keeps_only_unexplained_tracebacks(caplog):
    train_loop = logging.getLogger("detectron2.engine.train_loop")
    train_loop.addHandler(caplog.handler)

    def log(error):
        try:
            raise error
        except Exception:
            train_loop.exception("Exception during training:")

    try:
        with bad_input_in_one_line():
            log(FloatingPointError("Loss became NaN"))
            log(KeyError("a bug"))
    finally:
        train_loop.removeHandler(caplog.handler)
    explained, unexplained = caplog.records[0], caplog.records[-1]
    assert explained.exc_info is None and "see the last line" in explained.getMessage()
    assert unexplained.exc_info[0] is KeyError
    assert not train_loop.filters
