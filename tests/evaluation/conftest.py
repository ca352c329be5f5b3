"""Datasets that a test registers and that are gone after it."""

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from tests.common import forgotten_datasets


@pytest.fixture
def register_dataset():
    """A function that registers records under a name and returns the name."""

    def register(records, name="evaluated_dataset", **metadata):
        DatasetCatalog.register(name, lambda: records)
        MetadataCatalog.get(name).set(**metadata)
        names.append(name)
        return name

    with forgotten_datasets() as names:
        yield register
