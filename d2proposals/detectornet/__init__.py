from .generator import DetectorNet
from .network import BoxMaskNetwork, CropClassifier
from .roi_heads import DetectorNetHeads
from .sliding_windows import SlidingWindows

__all__ = [
    "BoxMaskNetwork",
    "CropClassifier",
    "DetectorNet",
    "DetectorNetHeads",
    "SlidingWindows",
]
