"""Images in parts: the same maps as of the whole, within bounds."""

import pytest
import torch
from torch import nn

from d2proposals.backbones.deeplab_largefov import RECEPTIVE_FIELD, DeepLabLargeFOV
from d2proposals.spop.tiles import run_in_tiles
from tests.spop.test_spop_generator import build_generator


def test_images_up_to_a_tile_and_its_overlap_go_as_a_whole():
    inputs = []

    def network(x):
        inputs.append(tuple(x.shape[-2:]))
        cells = [-(-side // 8) for side in x.shape[-2:]]
        return (torch.zeros(1, 1, *cells),)

    def parts_of(*size):
        inputs.clear()
        run(network, torch.zeros(1, *size), 128)
        return list(inputs)

    # A part of 128, and 224 around it: half of 435, in whole cells.
    assert parts_of(128 + 448, 128 + 448) == [(576, 576)]
    # One side is cut alone; the parts at the ends have an overlap on one side.
    assert parts_of(577, 8) == [(352, 8), (480, 8), (545, 8), (417, 8), (289, 8)]
    assert parts_of(8, 577) == [(8, 352), (8, 480), (8, 545), (8, 417), (8, 289)]
    assert len(parts_of(577, 577)) == 25


def build_networks(tile_size):
    """Networks in double precision, in which nothing is next to nothing."""
    generator = build_generator(
        "MODEL.SPOP.TILE_SIZE", tile_size, "INPUT.FORMAT", "RGB",
        "MODEL.SPOP.TRUNK.FORMAT", "BGR", "MODEL.SPOP.LOCALIZATION", "large_size",
    )  # fmt: skip
    for branch in (generator.networks.confidence.objectness, generator.networks.confidence.size):
        for parameter in branch.parameters():
            nn.init.normal_(parameter, std=0.3)
    return generator.networks.double().eval()


@pytest.mark.parametrize("size", [(40, 760), (750, 9)])
def test_maps_in_tiles_are_those_of_the_whole(size):
    # The branches of the confidence network see more than the trunk does.
    image = torch.randn(3, *size, dtype=torch.float64)
    whole = build_networks(4096).predict_maps(image, tuple(image.shape[1:]))
    tiles = build_networks(256).predict_maps(image, tuple(image.shape[1:]))
    for a, b in zip(whole[:3], tiles[:3], strict=True):
        assert a.std() > 1e-3
        # Outputs are rounded to single precision.
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-7 * a.abs().max())


def test_a_large_image_is_never_normalised_as_a_whole():
    networks = build_networks(64)
    sizes = []
    networks.pixel_normalization.register_forward_pre_hook(
        lambda module, inputs: sizes.append(inputs[0].shape[-2:])
    )
    networks.predict_maps(torch.randn(3, 8, 1200, dtype=torch.float64), (8, 1200))
    assert len(sizes) == 19 and max(max(size) for size in sizes) <= 64 + 2 * 240


def run(network, image, tile_size):
    return run_in_tiles(
        network, image, stride=8, receptive_field=RECEPTIVE_FIELD, tile_size=tile_size
    )


@pytest.mark.parametrize("size", [(700, 90), (61, 641), (600, 577), (8, 8), (585, 1)])
def test_tiles_are_the_whole(size):
    torch.manual_seed(0)
    trunk = DeepLabLargeFOV(width_factor=1 / 64, dropout=0.0).eval()
    image = torch.randn(3, *size)
    inputs = []

    def network(x):
        inputs.append(x.shape[-2:])
        features = trunk(x)["fc7"]
        return features, features[:, :2] * 2

    with torch.no_grad():
        whole = run(network, image, 1024)
        assert inputs == [size]
        tiles = run(network, image, 128)
    rows, columns = -(-size[0] // 8), -(-size[1] // 8)
    assert [tuple(x.shape[1:]) for x in whole] == [(rows, columns)] * 2
    for a, b in zip(whole, tiles, strict=True):
        assert a.abs().max() > 0
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * a.abs().max())
    # Bounded: a part and the receptive field around it.
    assert max(max(x) for x in inputs[1:]) <= 128 + 2 * 224
    parts = [
        -(-n // 16) if side > 128 + 448 else 1 for n, side in ((rows, size[0]), (columns, size[1]))
    ]
    assert len(inputs) == 1 + parts[0] * parts[1]
