from .generator import SPOP
from .localization_error import localization_errors
from .networks import ConfidenceNetwork, LocalizationNetwork

__all__ = ["SPOP", "ConfidenceNetwork", "LocalizationNetwork", "localization_errors"]
