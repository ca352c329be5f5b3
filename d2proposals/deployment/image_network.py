"""A model as a function of tensors: what leaves Python, and what it promises.

The contract of an exported network: one image of any size comes in, as the model's mapper would
hand it over; out come the boxes that the model's evaluation has for it, in the same order. It is
Detectron2's ``TracingAdapter`` around the model as it is, so that files hold what was evaluated.

Shape shorthand in this module:

    H, W: height and width of the image
    R: number of boxes found
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.export import TracingAdapter
from detectron2.modeling import GeneralizedRCNN, ProposalNetwork
from detectron2.structures import Instances
from torch import nn

# (height, width) of the image of a trace. No multiple of a stride, so that its padding is traced.
TRACED_SIZE = (117, 150)

# Takes (3, H, W) float32; returns the outputs of the contract.
ImageFunction = Callable[[torch.Tensor], tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Output:
    """One tensor of the contract.

    Attributes:
        name: in the exported file.
        meaning: shape, unit and order.
        read: takes the model's ``Instances`` of the image.
    """

    name: str
    meaning: str
    read: Callable[[Instances], torch.Tensor]


PROPOSALS = (
    Output(
        "boxes",
        "(R, 4) float32, XYXY in pixels of the image, best first",
        lambda found: found.proposal_boxes.tensor,
    ),
    Output("scores", "(R,) float32, objectness logits", lambda found: found.objectness_logits),
)
DETECTIONS = (
    Output(
        "boxes",
        "(R, 4) float32, XYXY in pixels of the image, best first",
        lambda found: found.pred_boxes.tensor,
    ),
    Output("scores", "(R,) float32, probabilities", lambda found: found.scores),
    Output("classes", "(R,) int64, contiguous ids from 0", lambda found: found.pred_classes),
)


class ImageNetwork:
    """A model seen through the contract.

    Attributes:
        model: in evaluation mode.
        outputs: what it returns of an image, in this order.
    """

    def __init__(self, model: nn.Module):
        """
        Args:
            model: Detectron2's ``ProposalNetwork`` or ``GeneralizedRCNN``.

        Raises:
            ValueError: it is neither, or a part of it says that it stays in Python.
        """
        check_traceable(model)
        self.model = model.eval()
        self.outputs = PROPOSALS if isinstance(model, ProposalNetwork) else DETECTIONS

    @property
    def output_names(self) -> list[str]:
        """Of the tensors, in their order."""
        return [output.name for output in self.outputs]

    @torch.no_grad()
    def __call__(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What the model's evaluation finds.

        Args:
            image: (3, H, W) float32, already resized, in ``INPUT.FORMAT``, [0, 255].
        """
        return tuple(self._found(self.model, [{"image": image}]))

    def adapter(self) -> TracingAdapter:
        """The model as a module of tensors, with an image of noise to trace it on."""
        inputs = [{"image": noise_image(TRACED_SIZE).to(self.model.device)}]
        # eval() also for the adapter: torch's exporter restores the mode of what it gets.
        return TracingAdapter(self.model, inputs, inference_func=self._found).eval()

    def _found(self, model: nn.Module, inputs: list[dict[str, Any]]) -> list[torch.Tensor]:
        (result,) = model(inputs)
        (found,) = result.values()
        return [output.read(found) for output in self.outputs]


def check_traceable(model: nn.Module) -> None:
    """ValueError with one line for a model that cannot leave Python."""
    for module in model.modules():
        reason = getattr(module, "stays_in_python", None)
        if reason is not None:
            raise ValueError(f"{type(module).__name__} cannot be exported: {reason}")
    if type(model) not in (ProposalNetwork, GeneralizedRCNN):
        raise ValueError(
            f"MODEL.META_ARCHITECTURE {type(model).__name__} cannot be exported: ProposalNetwork "
            "and GeneralizedRCNN can."
        )
    if model.proposal_generator is None:
        raise ValueError(
            "MODEL.PROPOSAL_GENERATOR.NAME 'PrecomputedProposals' cannot be exported: its "
            "proposals come from a file."
        )


def noise_image(size: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """An image (3, H, W) of noise, float32 in [0, 255], on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, *size), generator=generator).float()
