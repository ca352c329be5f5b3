"""What holds for the whole suite: slow tests come first, so that no worker ends with one of them."""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests before the others, each kind in its order."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
