"""Fixtures of the engine's tests."""

import pytest
import torch


@pytest.fixture
def process_group(tmp_path):
    """This process as the only one of a distributed job on the CPU."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
