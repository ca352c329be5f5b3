"""Any of torchvision's convolutional classification networks as a Detectron2 backbone.

The maps are called by their strides: "stride8" is the output of the last whole block before the
stride changes from 8 to 16 (:mod:`~d2proposals.backbones.block_chain`). Layers keep torchvision's
names, so that its weights fit.

Shape shorthand in this module:

    N: number of images in the batch
    H, W: height and width of the padded batch, in pixels
    s: stride of a map
"""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import NamedTuple

import torch
import torchvision
from detectron2.config import CfgNode, configurable
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool
from torch import nn
from torchvision.models import get_model, list_models
from torchvision.ops.misc import SqueezeExcitation

from ..proposals.image_extent import recover_image_sizes, valid_cells
from .block_chain import (
    Block,
    Dilation,
    Reach,
    dilations,
    find_chain,
    map_ends,
    measure_reach,
)
from .masked_norm import MaskedBatchNorm, MaskedGroupNorm
from .symmetric_padding import SymmetricConv2d
from .torchvision_weights import load_torchvision_weights, warn_of_other_pixels

_NORMS = ("FrozenBN", "BN", "SyncBN", "GN")
_PADDINGS = ("zeros", "symmetric")
_SIGHT = ("reach", "context", "receptive_field")


class TorchvisionBackbone(Backbone):
    """The blocks of a classification network up to the last map that is asked for.

    Networks with squeeze-excitation look at whole maps; with ``mask_padding`` they see each image
    up to its end, and give it the same maps alone and in a padded batch, and statistics of
    normalisations leave the padding out. Other networks treat the padding as Detectron2's own do:
    its zeros are the mean colour of an image.
    """

    @configurable
    def __init__(
        self,
        *,
        name: str,
        out_features: Sequence[str],
        weights: str = "",
        norm: str = "FrozenBN",
        freeze_at: int = 0,
        max_stride: int = 32,
        mask_padding: bool = True,
        padding: str = "zeros",
    ) -> None:
        """
        Args:
            name: of the network in torchvision, e.g. "mobilenet_v2".
            out_features: maps to return, such as ["stride8", "stride16"].
            weights: name of torchvision's weights or a file of them; "" for random ones.
            norm: "FrozenBN", "BN", "SyncBN" or "GN" in the place of batch normalisation. Other
                normalisations (ConvNeXt's) stay.
            freeze_at: blocks up to the map of stride 2^freeze_at are not trained; 0 for none. 2 is
                the stem and the first stage of a ResNet, as in Detectron2. Strides are those that
                the network has before any of them is traded for dilation.
            max_stride: of the last blocks, which are dilated instead where it is below theirs.
            mask_padding: of networks with squeeze-excitation.
            padding: of convolutions: "zeros", or "symmetric" for the map's own mirror image.

        Raises:
            ValueError: an unknown network, map, normalisation or padding; a network without such
                maps.
        """
        super().__init__()
        known = list_models(module=torchvision.models)
        if name not in known:
            raise ValueError(
                f"MODEL.TORCHVISION.NAME '{name}' is no classification network of torchvision; it "
                f"has {', '.join(known)}."
            )
        if norm not in _NORMS:
            raise ValueError(f"MODEL.TORCHVISION.NORM must be one of {_NORMS}, not '{norm}'.")
        if padding not in _PADDINGS:
            raise ValueError(
                f"MODEL.TORCHVISION.PADDING must be one of {_PADDINGS}, not '{padding}'."
            )
        plan = _plan(name, max_stride)
        network = get_model(name, weights=None, **_options(name))
        for layer, dilation in plan.dilations.items():
            dilation.apply(network.get_submodule(layer))
        # By the strides of the network itself: dilation leaves no other one behind the first.
        frozen = [b.name for b in plan.own_chain if freeze_at > 0 and b.stride <= 2**freeze_at]
        chain = plan.chain
        ends = {f"stride{stride}": block for stride, block in map_ends(chain).items()}
        unknown = [feature for feature in out_features if feature not in ends]
        if unknown or not out_features:
            raise ValueError(
                f"MODEL.TORCHVISION.OUT_FEATURES must be of {list(ends)} for {name}, got "
                f"{list(out_features)}."
            )
        self.name = name
        self._out_features = sorted(out_features, key=lambda feature: ends[feature].stride)
        self._out_feature_strides = {key: ends[key].stride for key in self._out_features}
        self._out_feature_channels = {key: ends[key].channels for key in self._out_features}
        last = [block.name for block in chain].index(ends[self._out_features[-1]].name)
        self._chain = chain[: last + 1]
        self._map_of = {ends[key].name: key for key in self._out_features}
        # What decides on how far a cell of the last map sees.
        self._sight = (name, self._out_features[-1], max_stride, norm, padding)
        self._take_over(network)
        if weights:
            load_torchvision_weights(self, name, weights)
        masks = mask_padding and any(isinstance(x, SqueezeExcitation) for x in self.modules())
        self._replace_norms(norm, masks)
        self._freeze(frozen)
        if padding == "symmetric":
            for block in self._chain:
                module = SymmetricConv2d.convert(self.get_submodule(block.name))
                self._set_block(block.name, module)
        self._extent = None
        if masks:
            self._extent = _Extent()
            self._mask_padding(self._extent)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        node = cfg.MODEL.TORCHVISION
        warn_of_other_pixels(cfg)
        return {
            "name": node.NAME,
            "out_features": node.OUT_FEATURES,
            "weights": node.WEIGHTS,
            "norm": node.NORM,
            "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT,
            "max_stride": node.MAX_STRIDE,
            "mask_padding": node.MASK_PADDING,
            "padding": node.PADDING,
        }

    @property
    def size_divisibility(self) -> int:
        """The largest stride of the blocks: maps of all strides then cover the same pixels."""
        return max(block.stride for block in self._chain)

    @property
    def stride(self) -> int:
        """Pixels per cell of the last map."""
        return self._chain[-1].stride

    @functools.cached_property
    def reach(self) -> Reach:
        """The pixels that a cell of the last map sees, measured.

        Raises:
            ValueError: a cell sees the whole image, as with squeeze-excitation.
        """
        reach = _reach(*self._sight)
        if reach is None:
            raise ValueError(
                f"A cell of {self.name} sees the whole image, so that an image cannot be taken in "
                "tiles: set MODEL.TORCHVISION.NAME to a network without squeeze-excitation and "
                "without group normalisation, such as mobilenet_v2 or resnet18."
            )
        return reach

    @property
    def context(self) -> int:
        """Pixels that a cell of the last map sees beyond its own, to a multiple of the stride."""
        return self.reach.context

    @property
    def receptive_field(self) -> int:
        """Side of the square of pixels that a cell of the last map sees."""
        return self.reach.receptive_field

    def __dir__(self) -> list[str]:
        """All attributes but those of a cell's sight: TorchScript's trace reads whatever stands
        here, and these are slow to measure, and raise where a cell sees the whole image."""
        return [name for name in super().__dir__() if name not in _SIGHT]

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Args:
            x: (N, 3, H, W) normalised images, padded with zeros at the right and the bottom.

        Returns:
            dict: "stride<s>" -> (N, C, H / s, W / s), for sides that ``size_divisibility`` divides.
        """
        if self._extent is not None:
            self._extent.read(x)
        is_batch = len(x) > 1 and x.device.type == "cpu"
        if is_batch and self._extent is None and self._chain[0].name in self._frozen:
            return self._forward_by_image(x)
        return self._forward_blocks(x, self._chain)[0]

    def _forward_by_image(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """The frozen blocks image by image, of which nothing is kept for a backward pass.

        Their maps are the largest of the network. Those of one image fit into memory that is used
        again; those of a batch are new pages each time.
        """
        frozen = list(takewhile(lambda block: block.name in self._frozen, self._chain))
        by_image = [self._forward_blocks(image, frozen) for image in x.split(1)]
        maps = {name: torch.cat([own[name] for own, _ in by_image]) for name in by_image[0][0]}
        last = torch.cat([end for _, end in by_image])
        return {**maps, **self._forward_blocks(last, self._chain[len(frozen) :])[0]}

    def _forward_blocks(
        self, x: torch.Tensor, blocks: Sequence[Block]
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The maps of some blocks by name, and what the last of the blocks returns."""
        maps = {}
        for block in blocks:
            x = self.get_submodule(block.name)(x)
            if block.name in self._map_of:
                maps[self._map_of[block.name]] = x
        return maps, x

    def train(self, mode: bool = True) -> TorchvisionBackbone:
        """Frozen blocks stay as in a test: nothing is dropped from them."""
        super().train(mode)
        for name in self._frozen:
            self.get_submodule(name).eval()
        return self

    def _take_over(self, network: nn.Module) -> None:
        """Make the chain's blocks this module's own, under their names in the network."""
        for block in self._chain:
            parent, path = self, block.name.split(".")
            for depth, key in enumerate(path[:-1]):
                if key not in parent._modules:
                    # As torchvision's own sequences, which may lack their last members here.
                    parent.add_module(key, nn.Sequential(OrderedDict()))
                parent = self.get_submodule(".".join(path[: depth + 1]))
            parent.add_module(path[-1], network.get_submodule(block.name))

    def _replace_norms(self, norm: str, masks: bool) -> None:
        """Put ``norm`` in the place of batch normalisations; ``masks`` for one that can leave
        padding out."""
        for block in self._chain:
            module = self.get_submodule(block.name)
            if norm == "FrozenBN":
                module = FrozenBatchNorm2d.convert_frozen_batchnorm(module)
            elif norm == "GN":
                module = _replace_batch_norms(module, _group_norm)
            elif masks:
                make = functools.partial(MaskedBatchNorm.of, is_synchronised=norm == "SyncBN")
                module = _replace_batch_norms(module, make)
            elif norm == "SyncBN":
                module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
            self._set_block(block.name, module)

    def _freeze(self, names: list[str]) -> None:
        """Stop training the blocks of these names, as far as they are in the chain."""
        inside = {name for name, _ in self.named_modules()}
        self._frozen = [name for name in names if name in inside]
        for name in self._frozen:
            module = self.get_submodule(name)
            module.requires_grad_(False)
            self._set_block(name, FrozenBatchNorm2d.convert_frozen_batchnorm(module))

    def _set_block(self, name: str, module: nn.Module) -> None:
        parent, _, key = name.rpartition(".")
        self.get_submodule(parent)._modules[key] = module

    def _mask_padding(self, extent: _Extent) -> None:
        """Have every layer that looks around, every pool over a map and every normalisation see
        the images alone."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1:
                module.register_forward_pre_hook(extent.clear_padding)
            elif isinstance(module, SqueezeExcitation):
                module.avgpool = _ImagePool(extent)
            elif isinstance(module, MaskedGroupNorm | MaskedBatchNorm):
                module.register_forward_pre_hook(extent.add_valid)


class _Extent:
    """Where the images of the batch end that is going through the network.

    Not a module: it is of one forward pass, and nothing of it is saved.
    """

    def __init__(self) -> None:
        self.sizes: torch.Tensor | None = None
        self.height = 0
        self._masks: dict[tuple[int, int], torch.Tensor] = {}

    def read(self, batch: torch.Tensor) -> None:
        """Take the sizes of a batch, (N, 3, H, W); none where no image is padded."""
        self.height, self._masks = batch.shape[-2], {}
        self.sizes = recover_image_sizes(batch)
        full = torch.tensor(batch.shape[-2:], device=batch.device)
        if bool((self.sizes == full).all()):
            self.sizes = None

    def valid(self, x: torch.Tensor) -> torch.Tensor | None:
        """(N, 1, h, w), 1 in the images' cells of a map; None where nothing is padded."""
        if self.sizes is None:
            return None
        size = tuple(x.shape[-2:])
        if size not in self._masks:
            # Sides that the stride does not divide are rounded up by a stride's layers.
            stride = -(-self.height // size[0])
            self._masks[size] = valid_cells(self.sizes, size, stride, x.dtype)
        return self._masks[size]

    def clear_padding(self, module: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor | None:
        """A forward pre-hook: zeros where no image is."""
        valid = self.valid(inputs[0])
        return None if valid is None else inputs[0] * valid

    def add_valid(self, module: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """A forward pre-hook: the cells that a normalisation's statistics are of."""
        valid = self.valid(inputs[0])
        return inputs if valid is None else (*inputs, valid)


class _ImagePool(nn.Module):
    """The mean over an image's own cells: (N, C, h, w) -> (N, C, 1, 1)."""

    def __init__(self, extent: _Extent) -> None:
        super().__init__()
        self._extent = extent

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        valid = self._extent.valid(x)
        if valid is None:
            return x.mean(dim=(2, 3), keepdim=True)
        return (x * valid).sum(dim=(2, 3), keepdim=True) / valid.sum(dim=(2, 3), keepdim=True)


def _group_norm(norm: nn.BatchNorm2d) -> nn.Module:
    """Group normalisation in the place of batch normalisation, 32 groups or as many as divide."""
    return MaskedGroupNorm(math.gcd(32, norm.num_features), norm.num_features)


def _replace_batch_norms(
    module: nn.Module, make: Callable[[nn.BatchNorm2d], nn.Module]
) -> nn.Module:
    """A module with other layers in the place of its batch normalisations."""
    if isinstance(module, nn.BatchNorm2d):
        return make(module)
    for key, child in module.named_children():
        module._modules[key] = _replace_batch_norms(child, make)
    return module


def _options(name: str) -> dict[str, bool]:
    """Arguments of the builders that would spend minutes on, or warn of, what is not used."""
    if name in ("googlenet", "inception_v3"):
        return {"init_weights": False, "aux_logits": False}
    return {}


class _Plan(NamedTuple):
    """What is made of a network of torchvision.

    Attributes:
        own_chain: its blocks.
        dilations: of the layers that trade their strides for dilation.
        chain: the blocks with these.
    """

    own_chain: list[Block]
    dilations: dict[str, Dilation]
    chain: list[Block]


# A network is run five times to learn this, and SPOP has three of a kind.
@functools.cache
def _plan(name: str, max_stride: int) -> _Plan:
    with torch.random.fork_rng():  # those of a seed do not depend on what is known already
        network = get_model(name, weights=None, **_options(name))
    own_chain = chain = find_chain(network, name)
    dilated: dict[str, Dilation] = {}
    if max_stride < chain[-1].stride:
        dilated = dilations(network, max_stride, name)
        for layer, dilation in dilated.items():
            dilation.apply(network.get_submodule(layer))
        chain = find_chain(network, name)
    return _Plan(own_chain, dilated, chain)


@functools.cache
def _reach(name: str, feature: str, max_stride: int, norm: str, padding: str) -> Reach | None:
    """What a cell of a network's map sees; None if it is the whole image."""
    with torch.random.fork_rng():
        backbone = TorchvisionBackbone(
            name=name, out_features=[feature], norm=norm, max_stride=max_stride, padding=padding
        )
    return measure_reach(backbone, backbone.stride)


@BACKBONE_REGISTRY.register()
def build_torchvision_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TorchvisionBackbone:
    """Build :class:`TorchvisionBackbone` for MODEL.BACKBONE.NAME or a generator's trunk."""
    return TorchvisionBackbone(cfg, input_shape)


@BACKBONE_REGISTRY.register()
def build_torchvision_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """A feature pyramid over the maps MODEL.FPN.IN_FEATURES of such a network.

    Its maps are p2 (stride 4) and so on, and p6 by max pooling where there is a p5, as in
    Detectron2's own pyramids.
    """
    bottom_up = build_torchvision_backbone(cfg, input_shape)
    shapes = bottom_up.output_shape()
    unknown = [name for name in cfg.MODEL.FPN.IN_FEATURES if name not in shapes]
    if unknown:
        raise ValueError(
            f"MODEL.FPN.IN_FEATURES must be of MODEL.TORCHVISION.OUT_FEATURES {list(shapes)}, got "
            f"{list(cfg.MODEL.FPN.IN_FEATURES)}. (A trunk of a generator's own has the same "
            "MODEL.TORCHVISION: beside it a detector takes another backbone, such as "
            "build_resnet_fpn_backbone.)"
        )
    has_p5 = shapes[cfg.MODEL.FPN.IN_FEATURES[-1]].stride == 32
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelMaxPool() if has_p5 else None,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
