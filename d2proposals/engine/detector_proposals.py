"""The proposals of a two-stage detector: recorded beside its detections, limited, or counted.

Detectron2's ``GeneralizedRCNN`` returns what its heads detect and keeps the proposals to itself.
The contexts here are hooks on its ``proposal_generator`` and ``roi_heads``, so that any generator
and any heads will do and every image passes the network once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Instances
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..evaluation.evaluator import ProposalEvaluator


class ProposalRecorder:
    """Holds what a detector's generator proposed last, until it is taken."""

    def __init__(self) -> None:
        self._proposals: list[Instances] | None = None

    def record(self, module: nn.Module, args: tuple, output: tuple) -> None:
        """A forward hook of a generator: keep its proposals."""
        self._proposals = output[0]

    def take(self, inputs: list[dict[str, Any]]) -> list[Instances]:
        """The proposals of the batch that the detector has just seen.

        Args:
            inputs: of the detector. Those with "proposals" of their own (precomputed ones) are
                detected from these.

        Returns:
            per image, proposals in pixels of the network input.
        """
        proposals, self._proposals = self._proposals, None
        if proposals is None:
            proposals = [x["proposals"] for x in inputs]
        assert len(proposals) == len(inputs), f"{len(proposals)} != {len(inputs)}"
        return proposals


@contextmanager
def recorded_proposals(model: nn.Module) -> Iterator[ProposalRecorder]:
    """Record the proposals of a detector within this context.

    Args:
        model: a ``GeneralizedRCNN``, possibly in ``DistributedDataParallel``, with a generator or
            on precomputed proposals.
    """
    recorder = ProposalRecorder()
    generator = _detector_of(model).proposal_generator
    if generator is None:
        yield recorder
        return
    handle = generator.register_forward_hook(recorder.record)
    try:
        yield recorder
    finally:
        handle.remove()


@contextmanager
def limited_proposals(model: nn.Module, limit: int) -> Iterator[None]:
    """Let a detector's heads see the best-scored ``limit`` proposals of each image only.

    Args:
        model: as for :func:`recorded_proposals`.
        limit: at least 1.

    Raises:
        ValueError: when the detector has no generator.
    """
    generator = _detector_of(model).proposal_generator
    if generator is None:
        raise ValueError(
            "Precomputed proposals are limited by DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST."
        )

    def limit_output(module: nn.Module, args: tuple, output: tuple) -> tuple:
        proposals, losses = output
        return [proposals_i[:limit] for proposals_i in proposals], losses

    handle = generator.register_forward_hook(limit_output)
    try:
        yield
    finally:
        handle.remove()


class ProposalCounter:
    """Counts the proposals that a detector's heads get.

    Attributes:
        num_images: images that the heads have seen.
        num_proposals: proposals of all these images.
        largest: the most of one image.
    """

    def __init__(self) -> None:
        self.num_images = 0
        self.num_proposals = 0
        self.largest = 0

    def count(self, module: nn.Module, args: tuple) -> None:
        """A forward pre-hook of heads, whose third argument the proposals are."""
        numbers = [len(proposals_i) for proposals_i in args[2]]
        self.num_images += len(numbers)
        self.num_proposals += sum(numbers)
        self.largest = max(self.largest, *numbers, 0)

    @property
    def mean(self) -> float:
        """Proposals of an image; 0 without images."""
        return self.num_proposals / max(self.num_images, 1)


@contextmanager
def counted_proposals(model: nn.Module) -> Iterator[ProposalCounter]:
    """Count the proposals that a detector's heads get within this context.

    Args:
        model: as for :func:`recorded_proposals`.
    """
    counter = ProposalCounter()
    handle = _detector_of(model).roi_heads.register_forward_pre_hook(counter.count)
    try:
        yield counter
    finally:
        handle.remove()


class DetectorProposalEvaluator(DatasetEvaluator):
    """Recall of a two-stage detector's proposals, from the forward pass that detects.

    Its results are those of :class:`ProposalEvaluator`.
    """

    def __init__(self, evaluator: ProposalEvaluator, recorder: ProposalRecorder) -> None:
        """
        Args:
            evaluator: of the dataset.
            recorder: of the detector's proposals.
        """
        self._evaluator = evaluator
        self._recorder = recorder

    def reset(self) -> None:
        self._evaluator.reset()

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Keep the proposals of a batch, in pixels of the original images.

        Args:
            inputs: of the detector.
            outputs: of the detector, which are not needed.
        """
        proposals = [
            {"proposals": in_original_pixels(proposals_i, input_)}
            for input_, proposals_i in zip(inputs, self._recorder.take(inputs), strict=True)
        ]
        self._evaluator.process(inputs, proposals)

    def evaluate(self) -> dict[str, dict[str, float]]:
        return self._evaluator.evaluate()


def in_original_pixels(proposals: Instances, input_: dict[str, Any]) -> Instances:
    """Proposals of an image in pixels of the original one.

    Args:
        proposals: in pixels of the network input.
        input_: of the detector; with "height" and "width" of the original image, if it differs.
    """
    height = input_.get("height", proposals.image_size[0])
    width = input_.get("width", proposals.image_size[1])
    return detector_postprocess(proposals, height, width)


def _detector_of(model: nn.Module) -> GeneralizedRCNN:
    detector = model.module if isinstance(model, DistributedDataParallel) else model
    if not isinstance(detector, GeneralizedRCNN):
        raise ValueError(
            "Only two-stage detectors (MODEL.META_ARCHITECTURE 'GeneralizedRCNN') hand proposals "
            f"to heads, not a {type(detector).__name__}."
        )
    return detector
