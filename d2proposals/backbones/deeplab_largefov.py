"""DeepLab-LargeFOV on VGG-16, the trunk of SPOP's three networks.

L.-C. Chen, G. Papandreou, I. Kokkinos, K. Murphy and A. L. Yuille. "Semantic Image Segmentation
with Deep Convolutional Nets and Fully Connected CRFs." ICLR 2015. arXiv:1412.7062.

Used by: Z. Jie, X. Liang, J. Feng, W. F. Lu, E. H. F. Tay and S. Yan. "Scale-aware Pixel-wise
Object Proposal Networks." IEEE Transactions on Image Processing 25, 2016, Table I.

Shape shorthand:
    N: number of images in the batch.
    H, W: height and width of the images in pixels.
    Hm, Wm: height and width of the output map in cells, see :func:`output_size`.

Naming convention:
    features.0 ... features.30: the layers of torchvision's VGG-16, under its names.
    pool5a, fc6, fc7: what DeepLab puts in place of its classifier, under DeepLab's names.
"""

import torch.nn.functional as F
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor, nn

from .inception_block import scale_width
from .masked_norm import build_norm

NORMS = ("", "BN", "SyncBN", "GN")
STRIDE = 8
# Side of the square of pixels that a cell of the output sees (Table I).
RECEPTIVE_FIELD = 435

# (convolutions, channels, hole size, stride of the pooling at the end) of conv1_x to conv5_x.
_STAGES = ((2, 64, 1, 2), (2, 128, 1, 2), (3, 256, 1, 2), (3, 512, 1, 1), (3, 512, 2, 1))
_FC_CHANNELS = 1024
_FC6_HOLE = 12


class DeepLabLargeFOV(Backbone):
    """VGG-16 with pooling and holes such that the output has stride 8 and sees 435 x 435 pixels.

    All pools have kernel 3 and padding 1. The first three have stride 2 and round sizes up (as
    Caffe's), so that **cell i of the output is centred on pixel 8 * i**, on both axes.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        width_factor: float = 1.0,
        norm: str = "",
        dropout: float = 0.5,
    ) -> None:
        """Build the trunk with He initialisation.

        Args:
            in_channels: Channels of the images.
            width_factor: On every layer's channels, rounded to multiples of 8; 1.0 is Table I.
            norm: Normalisation after each convolution, one of :data:`NORMS`; Table I has none.
            dropout: Share of activations dropped after fc6 and after fc7 in training (DeepLab).

        Raises:
            ValueError: A value is not allowed.
        """
        super().__init__()
        _check_arguments(width_factor, norm, dropout)
        layers: list[nn.Module] = []
        channels = in_channels
        for num_convs, width, hole, pool_stride in _STAGES:
            for _ in range(num_convs):
                out_channels = scale_width(width, width_factor)
                layers += [_conv(channels, out_channels, 3, hole, norm), nn.ReLU(inplace=True)]
                channels = out_channels
            layers.append(nn.MaxPool2d(3, stride=pool_stride, padding=1, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        # The zeros around the map count in the average, as in Caffe.
        self.pool5a = nn.AvgPool2d(3, stride=1, padding=1)
        fc_channels = scale_width(_FC_CHANNELS, width_factor)
        self.fc6 = _conv(channels, fc_channels, 3, _FC6_HOLE, norm)
        self.fc7 = _conv(fc_channels, fc_channels, 1, 1, norm)
        self.dropout = dropout
        self.out_channels = fc_channels
        self.receptive_field = RECEPTIVE_FIELD

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Run the trunk.

        Args:
            x: (N, C, H, W) images of any size, without padding: what lies around an image is not
                zero in the hidden maps if it went through the convolutions.

        Returns:
            {"fc7": (N, out_channels, Hm, Wm)}.
        """
        x = self.pool5a(self.features(x))
        x = F.dropout(F.relu_(self.fc6(x)), self.dropout, self.training)
        x = F.dropout(F.relu_(self.fc7(x)), self.dropout, self.training)
        return {"fc7": x}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return the one map's channels and stride."""
        return {"fc7": ShapeSpec(channels=self.out_channels, stride=STRIDE)}


def output_size(side: int) -> int:
    """Cells of the output along a side of ``side`` pixels.

    Unless ``side - 1`` is a multiple of 8, the last cell is centred outside the image, since each
    pool rounds up: 640 pixels have 81 cells, the last of them centred on pixel 640.

    Args:
        side: At least 1.
    """
    for _, _, _, stride in _STAGES:
        side = -(-(side - 1) // stride) + 1
    return side


def _conv(in_channels: int, out_channels: int, kernel_size: int, hole: int, norm: str) -> Conv2d:
    """A convolution that keeps the size, and its normalisation."""
    conv = Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        padding=hole * (kernel_size // 2),
        dilation=hole,
        bias=norm == "",
        norm=build_norm(norm, out_channels),
    )
    nn.init.kaiming_normal_(conv.weight, mode="fan_in", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def _check_arguments(width_factor: float, norm: str, dropout: float) -> None:
    """Raise ValueError unless the values are allowed; see :class:`DeepLabLargeFOV`."""
    if not width_factor > 0:
        raise ValueError(f"MODEL.SPOP.TRUNK.WIDTH_FACTOR must be positive, got {width_factor}.")
    if norm not in NORMS:
        raise ValueError(f"Unknown MODEL.SPOP.TRUNK.NORM {norm!r}; use one of {NORMS}.")
    if not 0 <= dropout < 1:
        raise ValueError(f"MODEL.SPOP.TRUNK.DROPOUT must be in [0, 1), got {dropout}.")
