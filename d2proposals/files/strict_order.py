"""Scores that tell the order of what they rank, also where they were equal."""

import torch


def lower_equal_scores(scores: torch.Tensor) -> torch.Tensor:
    """Lower scores by the smallest amounts that make them strictly decreasing.

    Args:
        scores: (R,) finite, in the order of the ranking, best first.

    Returns:
        Tensor: (R,) float32, each the largest number that is not above its input and is below
        its predecessor.
    """
    # The bits of a float32, read as an integer with the sign made arithmetic, count the floats in
    # their order: "the next smaller float" is "minus one", and out[i] = min(in[i], out[i-1] - 1)
    # becomes a cumulative minimum.
    bits = scores.float().contiguous().view(torch.int32).long()
    magnitude = bits & 0x7FFFFFFF
    position = torch.arange(len(bits), device=bits.device)
    ordered = torch.where(bits < 0, -magnitude, magnitude) + position
    if len(ordered):
        ordered = ordered.cummin(dim=0).values - position
    floats = ordered.abs().int().view(torch.float32)
    return torch.where(ordered < 0, -floats, floats)
