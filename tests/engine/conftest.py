"""Fixtures of the engine's tests."""

import pytest
import torch

from tests.engine.tiny_coco import loggers_as_before, registered, write_tiny_coco


@pytest.fixture(autouse=True)
def restored_loggers():
    with loggers_as_before():
        yield


@pytest.fixture
def tiny_coco(tmp_path):
    """The folder of a tiny COCO dataset, registered as "tiny_train" and "tiny_val"."""
    coco = write_tiny_coco(tmp_path / "datasets") / "coco"
    with registered(coco):
        yield coco


@pytest.fixture
def process_group(tmp_path):
    """This process as the only one of a distributed job on the CPU."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
