"""Fixtures of the engine's tests."""

import pytest

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
