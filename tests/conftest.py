"""What holds for the whole suite: slow tests come first, and a dataset that many tests use."""

import pytest
from detectron2.utils.env import seed_all_rng

from tests.engine.tiny_coco import loggers_as_before, registered, write_tiny_coco


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests before the others, each kind in its order: no worker ends with one of them."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture
def tiny_coco(tmp_path):
    """The folder of a tiny COCO dataset, registered as "tiny_train" and "tiny_val"."""
    coco = write_tiny_coco(tmp_path / "datasets") / "coco"
    with registered(coco):
        yield coco


@pytest.fixture(autouse=True)
def seeded():
    """What a test draws is the same in every order and process."""
    seed_all_rng(0)


@pytest.fixture(autouse=True)
def restored_loggers():
    """Jobs change loggers; each test finds them as they were."""
    with loggers_as_before():
        yield
