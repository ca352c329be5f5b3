from .generator import SPOP
from .networks import ConfidenceNetwork, LocalizationNetwork

__all__ = ["SPOP", "ConfidenceNetwork", "LocalizationNetwork"]
