"""Datasets of d2proposals. Importing this package registers them with Detectron2."""

from .shapes_dataset import register_shapes_datasets

__all__ = ["register_shapes_datasets"]
