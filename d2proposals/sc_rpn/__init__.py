from .generator import SCRPN
from .head import SCRPNHead

__all__ = ["SCRPN", "SCRPNHead"]
