"""The segmentation branch of one DeepMask and the scoring branch of another (DeepMask20*, Sec. 4).

Each branch needs the trunk that it was trained with, so the result has two: it is for a model with
MODEL.DEEPMASK.SHARED_TRUNK False.
"""

from collections.abc import Mapping

from torch import Tensor

_NETWORK = "proposal_generator.network."


def combine_branches(
    segmentation: Mapping[str, Tensor], scoring: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Weights of a model with two trunks.

    Args:
        segmentation: state dict of the model whose masks are wanted; what is not DeepMask's (a
            detector's weights) is taken from it, too.
        scoring: state dict of the model whose scores are wanted.

    Returns:
        the combined state dict.

    Raises:
        ValueError: one of them is no DeepMask, or its branches share a code.
    """
    for title, weights in (("segmentation", segmentation), ("scoring", scoring)):
        if any(key.startswith(_NETWORK + "shared_code.") for key in weights):
            raise ValueError(
                f"The {title} model's branches share a code of one trunk "
                "(MODEL.DEEPMASK.SHARED_CODE True): they cannot be taken apart."
            )
        for part in ("trunk.", "mask_head.", "score_head."):
            if not any(key.startswith(_NETWORK + part) for key in weights):
                raise ValueError(
                    f"The {title} model has no weights {_NETWORK}{part}*: give the checkpoint of a "
                    "model whose MODEL.PROPOSAL_GENERATOR.NAME is DeepMask."
                )
    left_out = (_NETWORK + "score_head.", _NETWORK + "score_trunk.")
    combined = {k: v for k, v in segmentation.items() if not k.startswith(left_out)}
    # A model with two trunks scores with its second one.
    own = any(key.startswith(_NETWORK + "score_trunk.") for key in scoring)
    source = _NETWORK + ("score_trunk." if own else "trunk.")
    for key, value in scoring.items():
        if key.startswith(source):
            combined[_NETWORK + "score_trunk." + key.removeprefix(source)] = value
        elif key.startswith(_NETWORK + "score_head."):
            combined[key] = value
    return combined
