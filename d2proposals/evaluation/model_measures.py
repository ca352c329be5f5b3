"""Measures of a network by itself, beside those of its proposals.

A paper's own errors need its network, not what it proposes. A function of this registry has them:

    def name(model: nn.Module, inputs: Iterable[dict]) -> dict[str, dict[str, float]]

``model`` is in evaluation; ``inputs`` are test images as a training maps them, with "instances",
without flips (engine/labelled_images.py). It returns measures by task, as an evaluator does. A row
of a table of experiments names it (``measures``, engine/experiment_tables.py).
"""

from fvcore.common.registry import Registry

MODEL_MEASURES: Registry = Registry("MODEL_MEASURES")
MODEL_MEASURES.__doc__ = __doc__
