import pytest
import torch
import torch.nn.functional as F

from d2proposals.zip_rpn.map_attention import (
    ExcitationRecalibration,
    MapAttentionDecision,
    SpatialMapAttention,
    build_map_attention,
)


def padded(x, right, bottom, value):
    return F.pad(x, (0, right, 0, bottom), value=value)


def build(attention_type, activation="none", top_channels=6, channels=8):
    torch.manual_seed(0)
    module = build_map_attention(
        attention_type,
        top_channels=top_channels,
        channels=channels,
        activation=activation,
        reduction=2,
    )
    # Further from its start than training would begin, so that mistakes show.
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def test_vector_is_the_global_maximum_of_three_convolutions():
    unit = build("channel")
    top = torch.randn(2, 6, 5, 7)
    x = F.relu(F.conv2d(top, unit.convs[0].weight, unit.convs[0].bias, padding=1))
    x = F.relu(F.conv2d(x, unit.convs[1].weight, unit.convs[1].bias, padding=1))
    x = F.conv2d(x, unit.convs[2].weight, unit.convs[2].bias, padding=1)
    vector = unit.vector(top, torch.ones(2, 1, 5, 7))
    assert vector.shape == (2, 8, 1, 1)
    assert torch.allclose(vector[..., 0, 0], x.flatten(2).max(dim=2).values, atol=1e-6)


def test_attended_maps_are_channels_times_vector():
    unit = build("channel")
    top, maps = torch.randn(1, 6, 3, 3), torch.randn(1, 8, 6, 6)
    valid, top_valid = torch.ones(1, 1, 6, 6), torch.ones(1, 1, 3, 3)
    attended = unit(maps, valid, top, top_valid)
    vector = unit.vector(top, top_valid)
    for j in range(8):
        assert torch.equal(attended[0, j], vector[0, j] * maps[0, j])  # Eq. 2


def test_gradient_of_the_vector_is_the_inner_product_of_eq_3():
    maps = torch.randn(2, 8, 6, 5, dtype=torch.float64)
    vector = torch.randn(2, 8, 1, 1, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 8, 6, 5, dtype=torch.float64)
    unit = build("channel").double()
    unit.vector = lambda top, top_valid: vector
    loss = (unit(maps, None, None, None) * weight).sin().sum()
    loss.backward()
    attended = (vector.detach() * maps).requires_grad_()
    (upper,) = torch.autograd.grad((attended * weight).sin().sum(), attended)
    inner_product = (upper * maps).sum(dim=(2, 3), keepdim=True)  # <dL/dy_j, x_j>
    assert torch.allclose(vector.grad, inner_product, atol=1e-10)


def test_gradients_of_the_maps_are_eq_4_and_f3_learns_through_the_vector():
    unit = build("channel")
    top = torch.randn(1, 6, 5, 7, requires_grad=True)
    maps, upper = torch.randn(1, 8, 6, 5, requires_grad=True), torch.randn(1, 8, 6, 5)
    valid, top_valid = torch.ones(1, 1, 6, 5), torch.ones(1, 1, 5, 7)
    (unit(maps, valid, top, top_valid) * upper).sum().backward()
    vector = unit.vector(top, top_valid)
    assert torch.allclose(maps.grad, vector.detach() * upper)  # mu_j dL/dy_j
    inner_product = (upper * maps.detach()).sum(dim=(2, 3), keepdim=True)
    (expected,) = torch.autograd.grad(vector, top, inner_product)
    assert expected.abs().max() > 0
    assert torch.allclose(top.grad, expected, atol=1e-5)


@pytest.mark.parametrize("attention_type", ["channel", "spatial", "excitation"])
@pytest.mark.parametrize("activation", ["none", "sigmoid", "relu"])
def test_an_image_has_the_same_attention_alone_and_in_a_padded_batch(attention_type, activation):
    unit = build(attention_type, activation)
    top, maps = torch.randn(1, 6, 5, 4), torch.randn(1, 8, 10, 8)
    ones = torch.ones(1, 1, 10, 8), torch.ones(1, 1, 5, 4)
    alone = unit(maps, ones[0], top, ones[1])
    batched = unit(
        padded(maps, 6, 4, 0.0),
        padded(ones[0], 6, 4, 0.0),
        padded(top, 3, 2, 9.0),  # large values in the padding of F3 must not reach the maximum
        padded(ones[1], 3, 2, 0.0),
    )
    assert torch.allclose(batched[..., :10, :8], alone, atol=1e-5)


def test_zeroing_only_the_maximum_would_not_do():
    # Why the unit zeroes the padding before each convolution: its biases and ReLUs fill the
    # padding, and the next convolution brings that back into the image.
    unit = build("channel")
    top, valid = torch.randn(1, 6, 5, 4), torch.ones(1, 1, 5, 4)
    alone = unit.vector(top, valid)
    x = padded(top, 3, 2, 0.0)
    for conv in unit.convs[:2]:
        x = F.relu(conv(x))
    careless = unit.convs[2](x)[..., :5, :4].amax(dim=(2, 3), keepdim=True)
    assert (careless - alone).abs().max() > 1e-3
    careful = unit.vector(padded(top, 3, 2, 0.0), padded(valid, 3, 2, 0.0))
    assert torch.allclose(careful, alone, atol=1e-6)


def test_unit_starts_by_leaving_the_maps_almost_as_they_are():
    torch.manual_seed(0)
    unit = MapAttentionDecision(top_channels=64, channels=32)
    vector = unit.vector(torch.rand(2, 64, 8, 8), torch.ones(2, 1, 8, 8))
    assert (vector - 1).abs().max() < 0.3


def test_spatial_attention_differs_by_place_and_excitation_does_not():
    torch.manual_seed(0)
    top, maps = torch.randn(1, 6, 4, 4), torch.ones(1, 8, 8, 8)
    valid, top_valid = torch.ones(1, 1, 8, 8), torch.ones(1, 1, 4, 4)
    spatial = build("spatial")
    assert isinstance(spatial, SpatialMapAttention)
    assert spatial(maps, valid, top, top_valid).flatten(2).std(dim=2).min() > 0
    excitation = build("excitation")
    assert isinstance(excitation, ExcitationRecalibration)
    result = excitation(maps, valid)
    assert torch.allclose(result.flatten(2).std(dim=2), torch.zeros(1, 8), atol=1e-6)
    hidden = F.relu(excitation.squeeze(torch.ones(1, 8)))
    assert torch.allclose(result[..., 0, 0], torch.sigmoid(excitation.excite(hidden)))


def test_bad_settings_are_named():
    settings = {"top_channels": 4, "channels": 4, "reduction": 2}
    with pytest.raises(ValueError, match="MAD.TYPE must be one of"):
        build_map_attention("chanel", activation="none", **settings)
    with pytest.raises(ValueError, match="MAD.ACTIVATION must be one of"):
        build_map_attention("channel", activation="tanh", **settings)
