from .generator import ZIP
from .zoom_network import ZoomNetwork, build_zoom_network_backbone

__all__ = ["ZIP", "ZoomNetwork", "build_zoom_network_backbone"]
