"""Pixels of the model to pixels of a trunk, against normalising the raw image directly."""

import pytest
import torch

from d2proposals.proposals.pixel_normalization import PixelNormalization

RGB = {"mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375)}
BGR = {"mean": (103.53, 116.28, 123.675), "std": (1.0, 1.0, 1.0)}


def normalize(rgb: torch.Tensor, image_format: str, mean, std) -> torch.Tensor:
    pixels = rgb.float() if image_format == "RGB" else rgb.float().flip(-3)
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def make(model_format, model, trunk_format, trunk) -> PixelNormalization:
    return PixelNormalization(
        model_format=model_format,
        model_mean=model["mean"],
        model_std=model["std"],
        trunk_format=trunk_format,
        trunk_mean=trunk["mean"],
        trunk_std=trunk["std"],
    )


FORMATS = [("RGB", RGB), ("BGR", BGR), ("BGR", RGB)]


@pytest.mark.parametrize("model_format, model", FORMATS)
@pytest.mark.parametrize("trunk_format, trunk", FORMATS)
def test_equals_normalizing_the_raw_image(model_format, model, trunk_format, trunk):
    rgb = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    module = make(model_format, model, trunk_format, trunk)
    pixels = normalize(rgb, model_format, **model)
    expected = normalize(rgb, trunk_format, **trunk)
    torch.testing.assert_close(module(pixels), expected, atol=1e-4, rtol=1e-5)
    assert torch.equal(module.to_rgb(pixels), rgb)
    assert module.is_identity == ((model_format, model) == (trunk_format, trunk))
    assert not module.state_dict()


def test_the_identity_copies_nothing():
    pixels = torch.randn(3, 4, 4)
    assert make("RGB", RGB, "RGB", RGB)(pixels) is pixels


def test_an_unknown_format_is_named():
    with pytest.raises(ValueError, match="'RGB' or 'BGR', got 'YUV-BT.601'"):
        make("YUV-BT.601", RGB, "RGB", RGB)
    with pytest.raises(ValueError, match="3 numbers"):
        make("RGB", {"mean": (1.0,), "std": (1.0,)}, "RGB", RGB)
