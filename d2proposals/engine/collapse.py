"""A collapse of the training, named while it happens.

A network whose ReLUs have died goes on training without an error: the layers behind the dead map
give their bias everywhere, all scores are equal, and the loss stands still.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn

logger = logging.getLogger(__name__)

# Outputs whose channels range over less than this part of their magnitude are constant: rounding.
_ROUNDING = 1e-6


class CollapseWarner(HookBase):
    """Warns of trained layers whose output is the same at every place of every image.

    Every ``period`` iterations the outputs of convolutions and linear layers are looked at in the
    step that runs anyway. A layer with weights that gives each of its channels one value over all
    images, levels and positions has a dead input (no unit of it is alive, as behind a ReLU that is
    zero everywhere) or weights that have lost all but the bias: what reads it cannot learn. Each
    such layer is one warning; "collapse/constant_layers" counts them in the metrics.
    """

    def __init__(self, period: int = 100) -> None:
        """
        Args:
            period: number of iterations from one look to the next; 0 for none.
        """
        self._period = period
        self._handles: list[Any] = []
        # Layer name -> lowest and highest value of each channel in this step, (2, channels).
        self._ranges: dict[str, torch.Tensor] = {}
        self._warned: set[str] = set()

    def before_step(self) -> None:
        if self._period <= 0 or (self.trainer.iter + 1) % self._period:
            return
        for name, module in self.trainer.model.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear) and module.weight.requires_grad:
                self._handles.append(module.register_forward_hook(self._recorder(name)))

    def _recorder(self, name: str) -> Any:
        def record(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            channels = output.detach().movedim(1 if isinstance(module, nn.Conv2d) else -1, 0)
            values = channels.reshape(len(channels), -1)
            # Of a single position nothing can be said.
            if values.shape[1] < 2:
                return
            extremes = torch.stack(values.float().aminmax(dim=1))
            known = self._ranges.get(name)
            if known is not None:
                lowest, highest = torch.stack([known, extremes], dim=1)
                extremes = torch.stack([lowest.amin(dim=0), highest.amax(dim=0)])
            self._ranges[name] = extremes

        return record

    def after_step(self) -> None:
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        ranges, self._ranges = self._ranges, {}
        if not ranges:
            return
        # One transfer for all layers.
        is_constant = torch.stack([_is_constant(extremes) for extremes in ranges.values()]).tolist()
        modules = dict(self.trainer.model.named_modules())
        constant = [
            name
            for name, is_one in zip(ranges, is_constant, strict=True)
            # Weights that start from zero have yet to learn anything.
            if is_one and modules[name].weight.any()
        ]
        self.trainer.storage.put_scalar("collapse/constant_layers", len(constant))
        new = sorted(set(constant) - self._warned)
        if new and comm.is_main_process():
            self._warned.update(new)
            names = ", ".join(new[:3]) + (f" and {len(new) - 3} others" if len(new) > 3 else "")
            logger.warning(
                f"Iteration {self.trainer.iter + 1}: the output of {names} is the same at every "
                "position of every image: what it reads is dead, and all scores or boxes that come "
                "from it are equal. Go back to an earlier checkpoint, with a lower "
                "SOLVER.BASE_LR, a longer warm-up or a tighter SOLVER.CLIP_GRADIENTS.CLIP_VALUE."
            )


def _is_constant(extremes: torch.Tensor) -> torch.Tensor:
    """Whether every channel has one value; of (2, channels) lowest and highest values."""
    lowest, highest = extremes
    magnitude = torch.maximum(lowest.abs(), highest.abs())
    return (highest - lowest <= _ROUNDING * magnitude).all()
