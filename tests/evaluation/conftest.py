"""Datasets that a test registers and that are gone after it."""

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog


@pytest.fixture
def register_dataset():
    """A function that registers records under a name and returns the name."""
    names = []

    def register(records, name="evaluated_dataset", **metadata):
        DatasetCatalog.register(name, lambda: records)
        MetadataCatalog.get(name).set(**metadata)
        names.append(name)
        return name

    yield register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
