"""d2proposals: region proposal generators for Detectron2, each after its paper.

Importing this package registers its generators, backbones and datasets with Detectron2.
"""

from . import backbones, data, sc_rpn, zip_rpn
from .config import add_d2proposals_config

__all__ = ["add_d2proposals_config", "backbones", "data", "sc_rpn", "zip_rpn"]
