from .generator import DeepMask
from .mask_head import MaskHead
from .network import DeepMaskNetwork
from .score_head import ScoreHead

__all__ = ["DeepMask", "DeepMaskNetwork", "MaskHead", "ScoreHead"]
