from .double_head import DoubleHeadROIHeads
from .generator import SCRPN
from .head import SCRPNHead

__all__ = ["SCRPN", "DoubleHeadROIHeads", "SCRPNHead"]
