"""The authors' DeepMask as Torch7 holds it, with random weights, and what its layers compute.

The layers are made and run one by one as DeepMask.lua, modelUtils.lua, InferDeepMask.lua and
fb.resnet.torch's resnet.lua have them, in plain torch and NumPy.
"""

import numpy as np
import torch
import torch.nn.functional as F

from tests.torch7_writer import Object, Storage, Tensor

SIDE, CODE, MASK, TARGET = 160, 512, 56, 112


class ReleasedModel:
    """Lua's table of a model and its settings, to be written and to be run."""

    def __init__(self, seed=0, conv_biases=False, affine_class="nn.SpatialConstDiagonal"):
        self.generator = np.random.default_rng(seed)
        self.conv_biases, self.affine_class = conv_biases, affine_class
        self.arrays = []
        self.trunk = sequence(*self._trunk_layers())
        mask = sequence(self._linear(CODE, MASK**2))
        enlarge = sequence(
            Object("nn.Copy"),
            Object("nn.View", size=[32, MASK, MASK]),
            Object("nn.SpatialReSamplingEx", owidth=TARGET, oheight=TARGET, mode="bilinear"),
            Object("nn.View"),
            Object("nn.Copy"),
        )
        self.mask = sequence(sequence(mask), enlarge)
        self.score = sequence(
            Object("nn.Dropout", p=0.5),
            self._linear(CODE, 1024),
            Object("nn.Threshold", threshold=0, val=1e-6, inplace=False),
            Object("nn.Dropout", p=0.5),
            self._linear(1024, 1),
        )
        self._share_one_storage()

    def table(self):
        """What torch.save writes."""
        model = Object(
            "nn.DeepMask",
            trunk=self.trunk, maskBranch=self.mask, scoreBranch=self.score, fSz=10, train=True,
        )  # fmt: skip
        config = {"iSz": 160, "oSz": 56, "gSz": 112, "scratch": False, "rundir": "exps/"}
        return {"model": model, "config": config}

    def _random(self, *shape, std=1.0, mean=0.0):
        values = self.generator.standard_normal(shape, dtype=np.float32) * np.float32(std) + mean
        self.arrays.append(Tensor(values.astype(np.float32)))
        return self.arrays[-1]

    def _share_one_storage(self):
        """As getParameters() leaves all weights of a network."""
        storage = Storage(np.concatenate([x.storage.values for x in self.arrays]), "Cuda")
        offset = 0
        for tensor in self.arrays:
            tensor.storage, tensor.name, tensor.offset = storage, "Cuda", offset
            offset += int(np.prod(tensor.size))

    def _linear(self, inputs, outputs):
        return Object(
            "nn.Linear",
            weight=self._random(outputs, inputs, std=inputs**-0.5),
            bias=self._random(outputs, std=0.1),
            gradWeight=Tensor(Storage(np.zeros(0, np.float32)), (), ()),
        )

    def _convolution(self, inputs, outputs, kernel, stride=1):
        """A convolution, its padding if its kernel is larger than 1, and the fixed affine."""
        fields = {"bias": self._random(outputs, std=0.2)} if self.conv_biases else {}
        layer = Object(
            "cudnn.SpatialConvolution",
            nInputPlane=inputs, nOutputPlane=outputs, kW=kernel, kH=kernel, dW=stride, dH=stride,
            padW=0, padH=0,
            weight=self._random(outputs, inputs, kernel, kernel,
                                std=(2 / inputs / kernel**2) ** 0.5),
            **fields,
        )  # fmt: skip
        if kernel > 1:
            pad = kernel // 2
            padding = Object(
                "nn.SpatialSymmetricPadding", pad_l=pad, pad_r=pad, pad_t=pad, pad_b=pad
            )
            layer = sequence(padding, layer)
        shape = (1, outputs, 1, 1) if self.affine_class.startswith("nn.") else (outputs,)
        scale = self._random(*shape, std=0.2, mean=0.6)
        return layer, Object(self.affine_class, a=scale, b=self._random(*shape, std=0.1))

    def _bottleneck(self, inputs, width, stride):
        relu = "cudnn.ReLU"
        branch = sequence(
            *self._convolution(inputs, width, 1), Object(relu),
            *self._convolution(width, width, 3, stride), Object(relu),
            *self._convolution(width, 4 * width, 1),
        )  # fmt: skip
        shortcut = Object("nn.Identity")
        if inputs != 4 * width:
            shortcut = sequence(*self._convolution(inputs, 4 * width, 1, stride))
        both = Object("nn.ConcatTable", modules=[branch, shortcut])
        return sequence(both, Object("nn.CAddTable"), Object(relu))

    def _trunk_layers(self):
        yield from self._convolution(3, 64, 7, 2)
        yield Object("cudnn.ReLU")
        yield Object("nn.SpatialMaxPooling", kW=3, kH=3, dW=2, dH=2, padW=1, padH=1)
        channels = 64
        for number, width, stride in ((3, 64, 1), (4, 128, 2), (6, 256, 2)):
            blocks = []
            for block in range(number):
                blocks.append(self._bottleneck(channels, width, stride if block == 0 else 1))
                channels = 4 * width
            yield sequence(*blocks)
        yield Object("nn.SpatialZeroPadding", pad_l=-1, pad_r=-1, pad_t=-1, pad_b=-1)
        common = self._convolution(1024, 128, 1)[0]
        common.fields["bias"] = self._random(128, std=0.1)
        yield common
        yield Object("cudnn.ReLU")
        yield Object("nn.View", size=[32, 12800])
        yield self._linear(12800, CODE)

    def patch(self, patches):
        """Masks (P, 112, 112) and scores (P,) of patches (P, 3, 192, 192)."""
        codes = run(self.trunk, patches)
        return run(self.mask, codes).view(-1, TARGET, TARGET), run(self.score, codes)[:, 0]

    def dense(self, image, scale):
        """As InferDeepMask.lua: an image (3, H, W) in [0, 1] -> masks (56 * 56, rows, columns) and
        scores (rows, columns) at every window of one scale."""
        sides = [int(np.floor(side * scale + 0.5)) for side in image.shape[1:]]
        scaled = resample(image[None], sides)[0]
        half = SIDE // 2
        canvas = torch.full((3, sides[0] + SIDE, sides[1] + SIDE), 0.5)
        canvas[:, half : half + sides[0], half : half + sides[1]] = scaled
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
        codes = run(self.trunk, ((canvas - mean) / std)[None], is_dense=True)
        masks = run(self.mask.fields["modules"][0], codes, is_dense=True)
        return masks[0], run(self.score, codes, is_dense=True)[0, 0]


def sequence(*layers):
    return Object("nn.Sequential", modules=list(layers))


def torch_of(tensor):
    storage = torch.from_numpy(tensor.storage.values)
    return torch.as_strided(storage, tensor.size, tensor.stride, tensor.offset)


def resample(x, sides):
    """nnx's bilinear resampling, (N, C, h, w) -> (N, C, *sides), by its formula."""
    for dim, number in zip((2, 3), sides, strict=True):
        ratio = (x.shape[dim] - 1) / (number - 1) if number > 1 else 0.0
        position = np.arange(number) * ratio
        before = np.floor(position).astype(int)
        share = torch.tensor(position - before, dtype=x.dtype)
        share = share[:, None] if dim == 2 else share
        after = np.minimum(before + 1, x.shape[dim] - 1)
        index = [slice(None)] * dim
        x = x[(*index, before)] * (1 - share) + x[(*index, after)] * share
    return x


def run(layer, x, is_dense=False):
    """What a layer makes of its input; dense: linear layers are convolutions, nothing is cut."""
    name, fields = layer.class_name.split(".")[1], layer.fields
    if name == "Sequential":
        for child in fields["modules"]:
            x = run(child, x, is_dense)
        return x
    if name == "ConcatTable":
        return [run(child, x, is_dense) for child in fields["modules"]]
    if name == "CAddTable":
        return x[0] + x[1]
    if name in ("ReLU", "Threshold"):
        return x.clamp(min=0)
    if name == "SpatialConvolution":
        bias = torch_of(fields["bias"]) if "bias" in fields else None
        return F.conv2d(x, torch_of(fields["weight"]), bias, stride=fields["dW"])
    if name in ("SpatialConstDiagonal", "ConstAffine"):
        return x * torch_of(fields["a"]).view(1, -1, 1, 1) + torch_of(fields["b"]).view(1, -1, 1, 1)
    if name == "SpatialSymmetricPadding":
        pad = fields["pad_l"]
        return torch.from_numpy(np.pad(x.numpy(), [(0, 0)] * 2 + [(pad, pad)] * 2, "symmetric"))
    if name == "SpatialZeroPadding":
        return x if is_dense else x[:, :, 1:-1, 1:-1]
    if name == "SpatialMaxPooling":
        return F.max_pool2d(x, 3, 2, 1)
    if name == "SpatialReSamplingEx":
        return resample(x[:, None] if x.dim() == 3 else x, [TARGET, TARGET])
    if name == "Linear":
        weight, bias = torch_of(fields["weight"]), torch_of(fields["bias"])
        if not is_dense:
            return x.flatten(1) @ weight.T + bias
        side = {12800: 10}.get(weight.shape[1], 1)
        return F.conv2d(x, weight.reshape(len(weight), -1, side, side), bias)
    if name == "View":
        size = fields.get("size")
        return x if is_dense or not size else x.view(-1, *size[1:])
    assert name in ("Copy", "Dropout", "Identity"), name
    return x
