from .generator import DetectorNet
from .network import BoxMaskNetwork, CropClassifier
from .roi_heads import DetectorNetHeads

__all__ = ["BoxMaskNetwork", "CropClassifier", "DetectorNet", "DetectorNetHeads"]
