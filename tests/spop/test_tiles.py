"""Images in parts: the same maps as of the whole, within bounds."""

import pytest
import torch

from d2proposals.backbones.deeplab_largefov import RECEPTIVE_FIELD, DeepLabLargeFOV
from d2proposals.spop.tiles import run_in_tiles


def run(network, image, tile_size):
    return run_in_tiles(
        network, image, stride=8, receptive_field=RECEPTIVE_FIELD, tile_size=tile_size
    )


@pytest.mark.parametrize("size", [(700, 90), (61, 641), (530, 505), (8, 8), (513, 1)])
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
    expected = 1 if max(size) <= 128 else -(-rows // 16) * -(-columns // 16)
    assert len(inputs) == 1 + expected
