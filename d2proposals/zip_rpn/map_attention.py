"""Map attention decision (MAD): which feature channels an image's proposals should listen to.

Source: H. Li, Y. Liu, W. Ouyang, X. Wang, "Zoom Out-and-In Network with Map Attention Decision for
Region Proposal and Object Detection", IJCV 2019 (arXiv 1709.04347), Sec. 3.2, Eq. 1-2, 8, Table 2.

Shape shorthand in this module:

    N: number of images in the batch
    C3: channels of F3, the highest map of the zoom-out network
    D: channels of the concatenated maps that are attended (lambda * C of Eq. 8)
    Hi, Wi: size of the attended maps; H3, W3: size of F3

Naming convention:

    valid: (N, 1, height, width) of 0 and 1, the cells of a map that lie inside the image. Every
        module here gives an image the same result alone and in a padded batch.
"""

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from torch import nn

from ..proposals.image_extent import resize_valid

ACTIVATIONS = {"none": nn.Identity, "sigmoid": nn.Sigmoid, "relu": nn.ReLU}


class MapAttentionDecision(nn.Module):
    """The MAD unit: an attention vector mu read off F3 multiplies the channels of the maps.

    Three 3x3 convolutions with D channels each, then a global maximum (Eq. 1); y_j = mu_j x_j
    (Eq. 2). ReLUs stand between the convolutions; the paper mentions no activation of mu.
    """

    def __init__(self, *, top_channels: int, channels: int, activation: str = "none"):
        """
        Args:
            top_channels: C3.
            channels: D.
            activation: of the attention vector: "none", "sigmoid" or "relu".
        """
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"MODEL.ZOOM_NETWORK.MAD.ACTIVATION must be one of {sorted(ACTIVATIONS)}, "
                f"got '{activation}'"
            )
        self.convs = nn.ModuleList(
            Conv2d(top_channels if i == 0 else channels, channels, kernel_size=3, padding=1)
            for i in range(3)
        )
        self.activation = ACTIVATIONS[activation]()
        for conv in self.convs[:2]:
            nn.init.kaiming_normal_(conv.weight, mode="fan_in", nonlinearity="relu")
            nn.init.zeros_(conv.bias)
        # The paper trains the unit from scratch and says no more. Starting at mu = 1 leaves the
        # maps as they are; starting at mu = 0 would switch both streams off.
        nn.init.normal_(self.convs[2].weight, std=0.001)
        nn.init.constant_(self.convs[2].bias, 1.0)

    def attention(self, top: torch.Tensor, top_valid: torch.Tensor) -> torch.Tensor:
        """Eq. 1, before the global maximum.

        Args:
            top: (N, C3, H3, W3), F3.
            top_valid: (N, 1, H3, W3).

        Returns:
            Tensor: (N, D, H3, W3); values in the padding mean nothing.
        """
        x = self.convs[0](top * top_valid)
        for conv in self.convs[1:]:
            # Zeroed before each convolution: the padding's values would come back in otherwise.
            x = conv(F.relu(x) * top_valid)
        return x

    def vector(self, top: torch.Tensor, top_valid: torch.Tensor) -> torch.Tensor:
        """The MAD vector mu of each image (Eq. 1): (N, D, 1, 1). Arguments as in attention()."""
        x = self.attention(top, top_valid)
        x = x.masked_fill(top_valid == 0, float("-inf"))
        return self.activation(x.amax(dim=(2, 3), keepdim=True))

    def forward(
        self,
        maps: torch.Tensor,
        valid: torch.Tensor,
        top: torch.Tensor,
        top_valid: torch.Tensor,
    ) -> torch.Tensor:
        """Attended maps Y (Eq. 2).

        Args:
            maps: (N, D, Hi, Wi), the concatenated maps X.
            valid: (N, 1, Hi, Wi).
            top: (N, C3, H3, W3), F3.
            top_valid: (N, 1, H3, W3).

        Returns:
            Tensor: (N, D, Hi, Wi).
        """
        return maps * self.vector(top, top_valid)


class SpatialMapAttention(MapAttentionDecision):
    """Table 2, "spatial MAD": no global maximum, the attention is resized to the maps instead.

    Unlike the paper, which aligns them "in help of deconvolution", bilinearly and without further
    parameters: so does its zoom-in path, where that worked better than deconvolution (Sec. 3.1).
    """

    def forward(
        self,
        maps: torch.Tensor,
        valid: torch.Tensor,
        top: torch.Tensor,
        top_valid: torch.Tensor,
    ) -> torch.Tensor:
        """Arguments and result as in :class:`MapAttentionDecision`."""
        attention = resize_valid(self.attention(top, top_valid), top_valid, valid)
        return maps * self.activation(attention)


class ExcitationRecalibration(nn.Module):
    """Table 2, "ER vector": the attention comes from the maps themselves.

    The squeeze-and-excitation unit of J. Hu, L. Shen, G. Sun, "Squeeze-and-Excitation Networks",
    CVPR 2018: global mean, two linear layers, sigmoid.
    """

    def __init__(self, *, channels: int, reduction: int = 16):
        """
        Args:
            channels: D.
            reduction: D over the number of hidden units.
        """
        super().__init__()
        hidden = max(channels // reduction, 1)
        self.squeeze = nn.Linear(channels, hidden)
        self.excite = nn.Linear(hidden, channels)

    def forward(
        self,
        maps: torch.Tensor,
        valid: torch.Tensor,
        top: torch.Tensor | None = None,
        top_valid: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Arguments and result as in :class:`MapAttentionDecision`; ``top`` is not looked at."""
        mean = (maps * valid).sum(dim=(2, 3)) / valid.sum(dim=(2, 3)).clamp(min=1)  # (N, D)
        vector = torch.sigmoid(self.excite(F.relu(self.squeeze(mean))))
        return maps * vector[:, :, None, None]


def build_map_attention(
    attention_type: str,
    *,
    top_channels: int,
    channels: int,
    activation: str,
    reduction: int,
) -> nn.Module:
    """The module of ``MODEL.ZOOM_NETWORK.MAD.TYPE`` (all but "none").

    Raises:
        ValueError: there is no such type.
    """
    if attention_type == "excitation":
        return ExcitationRecalibration(channels=channels, reduction=reduction)
    kinds = {"channel": MapAttentionDecision, "spatial": SpatialMapAttention}
    if attention_type not in kinds:
        raise ValueError(
            f"MODEL.ZOOM_NETWORK.MAD.TYPE must be one of {[*kinds, 'excitation', 'none']}, "
            f"got '{attention_type}'"
        )
    return kinds[attention_type](
        top_channels=top_channels, channels=channels, activation=activation
    )
