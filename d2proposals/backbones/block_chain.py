"""A classification network as a chain of blocks, and the strides of the maps between them.

torchvision's networks run their children one after another. Which of them ends the map of a stride
is found by running the network on images of two sizes, without data: names and types would mislead.

Shape shorthand in this module:

    N: number of images in the batch
    H, W: height and width of the images, in pixels
    h, w: height and width of a map, in cells

Naming convention:

    block: a module of the chain, taken whole, such as a residual block or a stage of such.
    chain: the blocks by their dotted names, in the order in which they run.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

# (height, width) of two images. Multiples of every stride, and neither square nor of one shape:
# what has the sides' order or the channels in its last places does not pass for a map.
_PROBES = ((128, 192), (256, 384))
# Pixels, several times what a cell of the usual networks sees.
_REACH_WIDTH = 2048


class Block(NamedTuple):
    """One block of a chain.

    Attributes:
        name: dotted name of the module in its network.
        stride: pixels per cell of its output.
        channels: of its output.
    """

    name: str
    stride: int
    channels: int


class _Call(NamedTuple):
    """One module's run: its input and output by identity, and the sides of both."""

    name: str
    input_id: int
    output_id: int
    in_size: tuple[int, int]
    out_shape: tuple[int, ...]


def find_chain(network: nn.Module, name: str) -> list[Block]:
    """The blocks up to the network's last map.

    A sequence of blocks (``nn.Sequential`` itself) is taken apart where it passes more than one
    change of the stride, so that a block is never cut: the down-sampling that opens a stage belongs
    to the stage.

    Args:
        network: any, as torchvision builds it.
        name: of the network, for the error.

    Raises:
        ValueError: the network does not run as a chain that gives maps (N, C, H / s, W / s).
    """
    try:
        first, second = (_record_calls(network, size) for size in _PROBES)
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            _no_maps(name, f"it does not take images of any size ({reason})")
        ) from None
    sizes = {call.name: call.out_shape for call in second}
    chain: list[Block] = []
    expected = None
    for call in _walk(network, first):
        if expected is not None and call.input_id != expected:
            break
        stride = _stride(call.out_shape, sizes[call.name])
        if stride is None:
            break
        chain.append(Block(call.name, stride, call.out_shape[1]))
        expected = call.output_id
    if not chain or chain[-1].stride < 4:
        raise ValueError(_no_maps(name, "its blocks do not hand on maps (N, C, H / s, W / s)"))
    return chain


def map_ends(chain: list[Block]) -> dict[int, Block]:
    """The block that ends the map of each stride: the last one before the stride changes."""
    return {block.stride: block for block in chain}


class Dilation(NamedTuple):
    """Settings of a layer whose network trades its strides for dilation."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def apply(self, layer: nn.Module) -> None:
        """Set them in place."""
        layer.stride, layer.padding, layer.dilation = self


def dilations(network: nn.Module, max_stride: int, name: str) -> dict[str, Dilation]:
    """What keeps the stride at most ``max_stride``; later layers reach as far by dilation.

    At the positions that the network had before, the maps stay as they were, up to normalisations
    and pools over whole maps.

    Args:
        network: as torchvision builds it.
        max_stride: a power of two.
        name: of the network, for the error.

    Returns:
        settings by the dotted names of the layers that change.

    Raises:
        ValueError: a layer cannot be dilated: it has an even kernel, is padded otherwise than by
            half of its kernel, or averages.
    """
    height = _PROBES[0][0]
    modules = dict(network.named_modules())
    found = {}
    for call in _record_calls(network, _PROBES[0], leaves=True):
        layer = modules[call.name]
        if not isinstance(layer, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)):
            continue
        before, after = height // call.in_size[0], height // call.out_shape[-2]
        if after <= max_stride:
            continue
        kernel, padding, dilation = (
            _pair(getattr(layer, key, 1))[0] for key in ("kernel_size", "padding", "dilation")
        )
        rate = max(before // max_stride, 1)
        if kernel % 2 == 0 or padding != kernel // 2 * dilation or isinstance(layer, nn.AvgPool2d):
            raise ValueError(
                f"MODEL.TORCHVISION.MAX_STRIDE {max_stride}: {name} cannot trade its strides for "
                f"dilation, because its layer {call.name} ({type(layer).__name__}, kernel "
                f"{kernel}, padding {padding}) has no middle; leave it at 32."
            )
        stride = min(after, max_stride) // min(before, max_stride)
        found[call.name] = Dilation((stride,) * 2, (padding * rate,) * 2, (dilation * rate,) * 2)
    return found


class Reach(NamedTuple):
    """The pixels that a cell of a map sees, along a side.

    Attributes:
        first, last: of cell 0, negative before the image; cell i sees ``stride * i`` further.
        stride: pixels per cell.
    """

    first: int
    last: int
    stride: int

    @property
    def context(self) -> int:
        """Pixels beyond the cell's own ``stride``, at its farther side, up to a multiple of it."""
        beyond = max(-self.first, self.last - self.stride + 1, 0)
        return -(-beyond // self.stride) * self.stride

    @property
    def receptive_field(self) -> int:
        """How many pixels a cell sees."""
        return self.last - self.first + 1

    @property
    def first_centre(self) -> float:
        """The pixel that cell 0 is centred on: 0 where all kernels are odd."""
        return (self.first + self.last) / 2


@torch.no_grad()
def measure_reach(network: nn.Module, stride: int) -> Reach | None:
    """Which pixels a cell of a map sees, measured by what it cannot hide.

    A column of the image that is not a number makes every cell that sees it not a number.

    Args:
        network: from (N, 3, H, W) to maps by name, of which the last is measured; it is left as it
            was. One without data is measured all the same.
        stride: pixels per cell of that map.

    Returns:
        Reach: None if every cell sees every pixel.
    """
    if next(network.parameters()).is_meta:
        network = copy.deepcopy(network).to_empty(device="cpu")
        for value in (*network.parameters(), *network.buffers()):
            value.zero_()  # what is not a number stays so under any weight
    parameter = next(network.parameters())
    was_training = network.training
    network.eval()
    width = _REACH_WIDTH // stride * stride
    # All columns of the cell in the middle, one after the other.
    columns = width // 2 // stride * stride + torch.arange(stride, device="cpu")
    image = torch.zeros(1, 3, 2 * stride, width, device=parameter.device, dtype=parameter.dtype)
    sees = []
    for column in columns:
        image.zero_()[..., column] = torch.nan
        last_map = list(network(image).values())[-1]
        sees.append(last_map.isnan().any(dim=1)[0].any(dim=0).cpu())
        if sees[-1].all():
            break
    network.train(was_training)
    if sees[-1].all():
        return None
    pixel, cell = torch.stack(sees).nonzero(as_tuple=True)
    distance = columns[pixel] - stride * cell
    return Reach(int(distance.min()), int(distance.max()), stride)


def _walk(network: nn.Module, calls: list[_Call]) -> Iterator[_Call]:
    """The calls of the chain's blocks in their order, sequences taken apart where needed."""
    by_name = {call.name: call for call in calls}

    def visit(module: nn.Module, prefix: str) -> Iterator[_Call]:
        children = [
            (f"{prefix}{name}", child)
            for name, child in module.named_children()
            if f"{prefix}{name}" in by_name
        ]
        children.sort(key=lambda item: calls.index(by_name[item[0]]))
        for name, child in children:
            if type(child) is nn.Sequential and _num_changes(child, name, by_name) > 1:
                yield from visit(child, f"{name}.")
            else:
                yield by_name[name]

    return visit(network, "")


def _num_changes(sequence: nn.Sequential, name: str, by_name: dict[str, _Call]) -> int:
    """How often the size of the map changes within a sequence."""
    inside = [by_name.get(f"{name}.{key}") for key, _ in sequence.named_children()]
    sizes = [by_name[name].in_size, *(call.out_shape[-2:] for call in inside if call)]
    return sum(before != after for before, after in zip(sizes, sizes[1:], strict=False))


@torch.no_grad()
def _record_calls(network: nn.Module, size: tuple[int, int], leaves: bool = False) -> list[_Call]:
    """Run a network without data, and note every module that takes and returns one tensor.

    Args:
        network: any; it is left as it was.
        size: (H, W) of the image.
        leaves: note modules without children alone.
    """
    calls: list[_Call] = []
    alive = []  # identities are those of living tensors

    def note(name: str):
        def hook(module: nn.Module, inputs: tuple, output: object) -> None:
            tensors = [*inputs[:1], output]
            if all(isinstance(x, torch.Tensor) and x.dim() == 4 for x in tensors):
                alive.extend(tensors)
                ids = (id(inputs[0]), id(output))
                calls.append(_Call(name, *ids, tuple(inputs[0].shape[-2:]), tuple(output.shape)))

        return hook

    handles = [
        module.register_forward_hook(note(name))
        for name, module in network.named_modules()
        if name and not (leaves and any(True for _ in module.children()))
    ]
    values = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    without_data = {name: value.to("meta") for name, value in values.items()}
    was_training = network.training
    try:
        image = torch.zeros(1, 3, *size, device="meta")
        torch.func.functional_call(network.eval(), without_data, (image,))
    finally:
        network.train(was_training)
        for handle in handles:
            handle.remove()
    return calls


def _stride(first: tuple[int, ...], second: tuple[int, ...]) -> int | None:
    """The stride of a map from its shapes at both probes; None for what is no such map."""
    strides = {
        size // cells if cells and size % cells == 0 else 0
        for shape, probe in zip((first, second), _PROBES, strict=True)
        for size, cells in zip(probe, shape[-2:], strict=True)
    }
    return strides.pop() if len(strides) == 1 and 0 not in strides else None


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def _no_maps(name: str, reason: str) -> str:
    return (
        f"MODEL.TORCHVISION.NAME '{name}' is no backbone: {reason}. Take a convolutional network, "
        "such as resnet50, mobilenet_v2, efficientnet_b0, convnext_tiny or regnet_y_400mf."
    )
