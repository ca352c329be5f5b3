"""Small networks with the structure of the paper's, for the tests of DeepMask."""

import torch

from d2proposals.backbones import VGG
from d2proposals.deepmask import DeepMaskNetwork, MaskHead, ScoreHead

# VGG-A's stages at a fraction of their width.
STAGES = ((4,), (8,), (8, 8), (12, 12), (12, 12))


def build_network(
    *, context=0, patch_size=224, stages=STAGES, shared=True, seed=0, **mask_settings
):
    """A network in evaluation mode, whose outputs vary from window to window."""
    torch.manual_seed(seed)
    trunk = VGG(stages=stages)
    map_size = patch_size // trunk.stride
    channels = stages[-1][-1]
    settings = {"channels": 6, "code_dim": 5, "mask_size": patch_size // 4} | mask_settings
    network = DeepMaskNetwork(
        trunk=trunk,
        score_trunk=None if shared else VGG(stages=stages),
        mask_head=MaskHead(
            in_channels=channels, map_size=map_size, patch_size=patch_size, **settings
        ),
        score_head=ScoreHead(in_channels=channels, map_size=map_size, hidden_dims=(7, 9)),
        patch_size=patch_size,
        context=context,
    )
    for name, parameter in network.named_parameters():
        if "features" in name and name.endswith("bias"):  # the border's zeros are not neutral then
            torch.nn.init.normal_(parameter, std=0.3)
    for layer in (network.score_head.fc1, network.score_head.fc2, network.score_head.fc3):
        torch.nn.init.normal_(layer.weight, std=(2 / layer.in_features) ** 0.5)
    return network.eval()
