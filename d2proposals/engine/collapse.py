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

# Where more than this part of the positions has no live unit, a head is on its way to a collapse.
_MANY_DEAD = 0.5
# Outputs whose channels range over less than this part of their magnitude are constant: rounding.
_ROUNDING = 1e-6


class CollapseWarner(HookBase):
    """Warns of trained layers whose output is the same at every place of every image.

    Every ``period`` iterations the outputs of convolutions and linear layers are looked at in the
    step that runs anyway. A layer with weights that gives each of its channels one value over all
    images, levels and positions has a dead input (no unit of it is alive, as behind a ReLU that is
    zero everywhere) or weights that have lost all but the bias: what reads it cannot learn. Each
    such layer is one warning; "collapse/constant_layers" counts them in the metrics.

    So is a layer that looks at single positions and gives its bias at more than half of them: no
    unit of its input is alive there, and all scores of such a level are equal while others go on
    learning. "collapse/dead_positions" is the largest such share of a layer.
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
        # Layer name -> number of positions with the bias alone and of all positions, (2,).
        self._dead: dict[str, torch.Tensor] = {}
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
            # Of a larger kernel, or behind a norm or activation, dead positions look otherwise.
            is_pointwise = isinstance(module, nn.Linear) or max(module.kernel_size) == 1
            if not is_pointwise or any(
                getattr(module, name, None) is not None for name in ("norm", "activation")
            ):
                return
            bias = values.new_zeros(()) if module.bias is None else module.bias.detach()[:, None]
            is_dead = (values == bias.to(values.dtype)).all(dim=0)
            counts = torch.stack(
                [is_dead.sum(), is_dead.new_tensor(len(is_dead), dtype=torch.long)]
            )
            self._dead[name] = self._dead.get(name, 0) + counts

        return record

    def after_step(self) -> None:
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        ranges, self._ranges = self._ranges, {}
        dead, self._dead = self._dead, {}
        if not ranges:
            return
        modules = dict(self.trainer.model.named_modules())
        figures = []
        for name, extremes in ranges.items():
            counts = dead.get(name, extremes.new_zeros(2))
            # Weights that start from zero have yet to learn anything.
            is_learning = modules[name].weight.any()
            share = is_learning * counts[0] / counts[1].clamp(min=1)
            figures.append(torch.stack([is_learning * _is_constant(extremes), share]))
        # One transfer for all layers.
        figures = dict(zip(ranges, torch.stack(figures).tolist(), strict=True))
        constant = [name for name, (is_constant, _) in figures.items() if is_constant]
        shares = {name: share for name, (_, share) in figures.items()}
        self.trainer.storage.put_scalar("collapse/constant_layers", len(constant))
        self.trainer.storage.put_scalar("collapse/dead_positions", max(shares.values()))
        many_dead = [name for name, share in shares.items() if share > _MANY_DEAD]
        self._warn(
            constant,
            "the output of {} is the same at every position of every image: what it reads is dead, "
            "and all scores or boxes that come from it are equal.",
        )
        self._warn(
            many_dead,
            "the output of {} is its bias at more than half of the positions: no unit of what it "
            "reads is alive there, and all scores or boxes of these are equal.",
        )

    def _warn(self, names: list[str], what: str) -> None:
        """Log what layers show, once for each layer."""
        new = sorted(set(names) - self._warned)
        if not new or not comm.is_main_process():
            return
        self._warned.update(new)
        listed = ", ".join(new[:3]) + (f" and {len(new) - 3} others" if len(new) > 3 else "")
        logger.warning(
            f"Iteration {self.trainer.iter + 1}: {what.format(listed)} Go back to an earlier "
            "checkpoint, with a lower SOLVER.BASE_LR, a longer warm-up or a tighter "
            "SOLVER.CLIP_GRADIENTS.CLIP_VALUE."
        )


def _is_constant(extremes: torch.Tensor) -> torch.Tensor:
    """Whether every channel has one value; of (2, channels) lowest and highest values."""
    lowest, highest = extremes
    magnitude = torch.maximum(lowest.abs(), highest.abs())
    return (highest - lowest <= _ROUNDING * magnitude).all()
