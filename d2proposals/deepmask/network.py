"""DeepMask's network: a shared trunk, a branch for the mask and one for the score.

Source: P. O. Pinheiro, R. Collobert and P. Dollar, "Learning to Segment Object Candidates", NIPS
2015 (arXiv:1506.06204), Sec. 3.1, 3.3 and 3.4.

Each branch has a form for patches, by which it is trained, and one for a whole map, which gives
every window of the map what the patch form gives the window cut out.

Shape shorthand in this module:

    P: number of patches
    C: channels of the trunk's map
    m: side of a patch's map, in cells (14)
    s: side of a predicted mask, in cells (56)
    S: side of a patch, in pixels (224)
"""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.modeling import Backbone
from torch import nn

from ..backbones.trunks import build_registered_trunk
from .image_canvas import CanvasStyle
from .mask_head import MaskHead
from .score_head import CodeScoreHead, ScoreHead
from .shared_code import SharedCode


class DeepMaskNetwork(nn.Module):
    """The trunk and both branches."""

    def __init__(
        self,
        *,
        trunk: Backbone,
        mask_head: MaskHead,
        score_head: ScoreHead | CodeScoreHead,
        patch_size: int = 224,
        context: int = 0,
        score_trunk: Backbone | None = None,
        shared_code: SharedCode | None = None,
        canvas_style: CanvasStyle | None = None,
    ) -> None:
        """
        Args:
            trunk: with one map, and the attributes of :class:`VGG` that say what a cell of it sees.
            mask_head: the segmentation branch, on the trunk's map or on codes.
            score_head: the scoring branch, on the same.
            patch_size: S, in pixels; a multiple of the trunk's stride.
            context: pixels of the image that a patch has around it on each side and that are cut
                off its map. A multiple of the trunk's stride.
            score_trunk: a trunk of the scoring branch's own; None to share one, as in the paper.
            shared_code: what both branches have in common behind the trunk; None for nothing, as in
                the paper.
            canvas_style: what is around images, and how they are scaled.

        Raises:
            ValueError: a size that is negative, zero for a patch, or not divided by the stride; two
                trunks with one code.
        """
        super().__init__()
        for key, size, least in (("PATCH_SIZE", patch_size, 1), ("CONTEXT", context, 0)):
            if size % trunk.stride or size < least:
                sign = "positive " if least else ""
                raise ValueError(
                    f"MODEL.DEEPMASK.{key} must be a {sign}multiple of {trunk.stride}, the stride "
                    f"of the trunk, got {size}."
                )
        if shared_code is not None and score_trunk is not None:
            raise ValueError(
                "MODEL.DEEPMASK.SHARED_CODE True needs SHARED_TRUNK True: a code is of one trunk."
            )
        self.trunk = trunk
        self.score_trunk = score_trunk
        self.shared_code = shared_code
        self.mask_head = mask_head
        self.score_head = score_head
        self.patch_size = patch_size
        self.context = context
        self.canvas_style = canvas_style or CanvasStyle()

    @property
    def stride(self) -> int:
        """Pixels between two windows of a map."""
        return self.trunk.stride

    @property
    def map_size(self) -> int:
        """Side of a window's part of the trunk's map, in cells."""
        return self.patch_size // self.stride

    def branch_parts(self, branch: str) -> list[nn.Module]:
        """What "mask" or "score" has alone: its head, and its trunk unless they share one."""
        head = self.mask_head if branch == "mask" else self.score_head
        trunk = self.trunk if branch == "mask" else self.score_trunk
        return [head] if self.score_trunk is None else [head, trunk]

    def mask_logits(self, patches: torch.Tensor) -> torch.Tensor:
        """Mask logits of patches.

        Args:
            patches: (P, 3, S + 2 context, S + 2 context), normalised for the trunk.

        Returns:
            Tensor: (P, s, s).
        """
        return self.mask_head(self.mask_head.embed(self._patch_maps(self.trunk, patches)))

    def score_logits(self, patches: torch.Tensor) -> torch.Tensor:
        """Score logits of patches as in :meth:`mask_logits`; (P,)."""
        return self.score_head(self._patch_maps(self.score_trunk or self.trunk, patches))

    def mask_and_score_logits(
        self, patches: torch.Tensor, num_masks: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both branches on the same patches, the trunk being run once if it is shared.

        Args:
            patches: as in :meth:`mask_logits`.
            num_masks: masks are computed of the first so many patches.

        Returns:
            Tensor: (num_masks, s, s).
            Tensor: (P,).
        """
        if self.score_trunk is not None:
            return self.mask_logits(patches[:num_masks]), self.score_logits(patches)
        maps = self._patch_maps(self.trunk, patches)
        return self.mask_head(self.mask_head.embed(maps[:num_masks])), self.score_head(maps)

    def _patch_maps(self, trunk: Backbone, patches: torch.Tensor) -> torch.Tensor:
        """Maps of patches that the heads see: (P, C, m, m) without the cells of the context, or
        (P, D, 1, 1) codes."""
        # Convolutions are faster with the channels of a pixel side by side.
        patches = patches.contiguous(memory_format=torch.channels_last)
        (maps,) = trunk(patches).values()
        border = self.context // self.stride
        side = maps.shape[-1] - 2 * border
        maps = maps[..., border : border + side, border : border + side]
        return maps if self.shared_code is None else self.shared_code(maps)

    def window_maps(self, maps: torch.Tensor) -> torch.Tensor:
        """What the heads see of all windows of a trunk's map.

        Args:
            maps: (C, Hf, Wf), without the cells of the context.

        Returns:
            Tensor: the map itself, or (D, Hf - m + 1, Wf - m + 1) codes.
        """
        return maps if self.shared_code is None else self.shared_code.at_every_window(maps[None])[0]


# Keys that choose what these trunks return.
_FEATURES_OF = {
    "build_vgg_backbone": "MODEL.VGG.OUT_FEATURES",
    "build_torchvision_backbone": "MODEL.TORCHVISION.OUT_FEATURES",
}


def build_network(cfg: CfgNode) -> DeepMaskNetwork:
    """The network of MODEL.DEEPMASK."""
    node = cfg.MODEL.DEEPMASK

    def build_trunk() -> Backbone:
        return build_registered_trunk(cfg, node.TRUNK, node)

    trunk = build_trunk()
    if not hasattr(trunk, "stride") or not hasattr(trunk, "context"):
        raise ValueError(
            f"MODEL.DEEPMASK.TRUNK {node.TRUNK} does not say what a cell of its map sees "
            "(attributes stride and context): use build_vgg_backbone, or a backbone that has both."
        )
    shapes = trunk.output_shape()
    if len(shapes) != 1:
        raise ValueError(
            f"DeepMask reads one map of its trunk {node.TRUNK}, which returns {sorted(shapes)}: "
            f"set {_FEATURES_OF.get(node.TRUNK, 'its features')} to the last stage's name alone."
        )
    (shape,) = shapes.values()
    if shape.stride != trunk.stride:
        raise ValueError(
            f"DeepMask reads the last map of its trunk, at stride {trunk.stride}, but "
            f"{node.TRUNK} returns {next(iter(shapes))} at stride {shape.stride}: set "
            f"{_FEATURES_OF.get(node.TRUNK, 'its features')} to the last stage."
        )
    map_size = node.PATCH_SIZE // shape.stride
    mask_settings = {
        "patch_size": node.PATCH_SIZE,
        "mask_size": node.MASK_SIZE,
        "upsampling": node.UPSAMPLING,
        "target_size": node.TARGET_SIZE,
    }
    score_settings = {"hidden_dims": node.SCORE_DIMS, "dropout": node.DROPOUT}
    layers = {"channels": node.MASK_CHANNELS, "code_dim": node.CODE_DIM}
    shared_code = None
    if node.SHARED_CODE:
        shared_code = SharedCode(in_channels=shape.channels, map_size=map_size, **layers)
        # A window's code is a map of one cell.
        mask_head = MaskHead(
            in_channels=node.CODE_DIM, map_size=1, channels=None, code_dim=0, **mask_settings
        )
        score_head = CodeScoreHead(code_dim=node.CODE_DIM, **score_settings)
    else:
        in_map = {"in_channels": shape.channels, "map_size": map_size}
        mask_head = MaskHead(**in_map, **layers, **mask_settings)
        score_head = ScoreHead(**in_map, **score_settings)
    return DeepMaskNetwork(
        trunk=trunk,
        score_trunk=None if node.SHARED_TRUNK else build_trunk(),
        shared_code=shared_code,
        mask_head=mask_head,
        score_head=score_head,
        patch_size=node.PATCH_SIZE,
        context=node.CONTEXT,
        canvas_style=CanvasStyle(
            border=node.BORDER, border_color=tuple(node.BORDER_COLOR), resampling=node.RESAMPLING
        ),
    )
