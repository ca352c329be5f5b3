"""Any registered backbone as the trunk of a generator with a network of its own."""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone


def build_registered_trunk(
    cfg: CfgNode, name: str, pixels: CfgNode, *, sees_crops: bool = False
) -> Backbone:
    """Build a backbone that sees a generator's own pixels, whatever those of the model are.

    Args:
        cfg: of the model.
        name: in Detectron2's ``BACKBONE_REGISTRY``.
        pixels: the generator's node with ``FORMAT``, ``PIXEL_MEAN`` and ``PIXEL_STD``, which
            ``PixelNormalization`` makes of the model's.
        sees_crops: its inputs are whole: zeros at their ends, beyond an image, are no padding of a
            batch.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.INPUT.FORMAT = pixels.FORMAT
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = pixels.PIXEL_MEAN, pixels.PIXEL_STD
    if sees_crops:
        cfg.MODEL.TORCHVISION.MASK_PADDING = False
    cfg.freeze()
    return BACKBONE_REGISTRY.get(name)(cfg, ShapeSpec(channels=3))
