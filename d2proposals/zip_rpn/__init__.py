from .generator import ZIP
from .roi_heads import ZIPHeads
from .zoom_network import ZoomNetwork, build_zoom_network_backbone

__all__ = ["ZIP", "ZIPHeads", "ZoomNetwork", "build_zoom_network_backbone"]
