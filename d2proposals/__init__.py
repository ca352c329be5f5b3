"""d2proposals: region proposal generators for Detectron2, each after its paper.

Importing this package registers its generators, backbones and datasets with Detectron2.
"""

from . import backbones, data, deepmask, detectornet, sc_rpn, spop, zip_rpn
from .config import add_d2proposals_config
from .data import paper_splits

__all__ = [
    "add_d2proposals_config",
    "backbones",
    "data",
    "deepmask",
    "detectornet",
    "paper_splits",
    "sc_rpn",
    "spop",
    "zip_rpn",
]
