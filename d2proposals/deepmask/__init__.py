from .generator import DeepMask
from .network import DeepMaskNetwork, MaskHead, ScoreHead

__all__ = ["DeepMask", "DeepMaskNetwork", "MaskHead", "ScoreHead"]
