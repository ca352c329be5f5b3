"""The three networks together: their layout in memory."""

import copy

import pytest
import torch
from torch import nn

from tests.common import make_images
from tests.spop.test_spop_generator import build_generator


# The statistics of group normalisation are sums in another order.
@pytest.mark.parametrize(("norm", "tolerance"), [("", 1e-5), ("GN", 5e-5)])
def test_channels_last_is_contiguous_to_1e_5(norm, tolerance):
    generator = build_generator(
        "MODEL.SPOP.TRUNK.NORM", norm, "MODEL.SPOP.TRUNK.DROPOUT", 0.0,
        "INPUT.FORMAT", "RGB", "MODEL.SPOP.TRUNK.FORMAT", "BGR",
    )  # fmt: skip
    networks = generator.networks
    layers = [m for m in networks.modules() if isinstance(m, nn.Conv2d)]
    plain = copy.deepcopy(networks).to(memory_format=torch.contiguous_format)
    plain._normalize = lambda x: plain.pixel_normalization(x).contiguous()
    last = torch.channels_last

    def check(layer, args):
        # Of one channel or one pixel, both layouts are the same.
        assert args[0].is_contiguous(memory_format=last)
        assert layer.weight.is_contiguous(memory_format=last)
        layer.seen = True

    for layer in layers:
        layer.register_forward_pre_hook(check)
    images = make_images((75, 100), (64, 50))
    with torch.no_grad():
        for a, b in ((networks(images), plain(images)),
                     (networks.predict_maps(images[0], (150, 200)),
                      plain.predict_maps(images[0], (150, 200)))):  # fmt: skip
            pairs = [(a.objectness, b.objectness), (a.size, b.size)]
            if isinstance(a.coordinates, dict):
                pairs += zip(a.coordinates.values(), b.coordinates.values(), strict=True)
            else:
                pairs.append((a.coordinates, b.coordinates))
            for x, y in pairs:
                assert y.std() > 1e-3
                assert (x - y).abs().max() <= tolerance * y.abs().max()
    assert all(layer.seen for layer in layers)
    # Weights are the same to the state dict, and come back to the same layout.
    networks.load_state_dict(plain.state_dict())
    assert all(layer.weight.is_contiguous(memory_format=last) for layer in layers)
