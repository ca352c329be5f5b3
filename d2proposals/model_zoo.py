"""The project's configurations by name, wherever it is installed, and models built from them.

The functions are those of Detectron2's ``model_zoo``:

    from d2proposals import model_zoo
    cfg = model_zoo.get_config("photos/sc_rpn_mobilenet_v2.yaml")
    lazy = model_zoo.get_config("lazy/sc_rpn_only.py")
    model = model_zoo.get("photos/sc_rpn_mobilenet_v2.yaml", trained=True, device="cpu")

Weights that come with the package are in ``weights/``, under the names of their configurations
(docs/model_card.md).
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import torch
from detectron2.config import CfgNode, LazyConfig, get_cfg
from omegaconf import DictConfig
from torch import nn

from .config import add_d2proposals_config
from .engine import check_config, fit_to_device, load_trained_model

_WEIGHTS = Path(str(resources.files(__package__))) / "weights"


def get_config_file(config_path: str) -> str:
    """The file of a configuration.

    Args:
        config_path: below ``configs/``, e.g. "sc_rpn_only.yaml", "shapes/zip_rpn_only.yaml",
            "lazy/sc_rpn_only.py".

    Raises:
        ValueError: there is no such configuration; names those of its folder.
    """
    folder = _config_folder()
    path = folder / config_path
    if not path.is_file():
        kind = f"*{path.suffix or '.yaml'}"
        found = sorted(path.parent.glob(kind)) or sorted(folder.rglob("*.yaml"))
        near = [str(item.relative_to(folder)) for item in found]
        raise ValueError(f"There is no configuration '{config_path}'; there are {', '.join(near)}.")
    return str(path)


def get_checkpoint_file(config_path: str) -> str:
    """The file of the weights that come with the package for a configuration.

    Args:
        config_path: as for :func:`get_config_file`.

    Raises:
        ValueError: there are none; names the configurations that have some.
    """
    path = (_WEIGHTS / config_path).with_suffix(".pth")
    if not path.is_file() or not config_path.endswith(".yaml"):
        known = sorted(
            x.relative_to(_WEIGHTS).with_suffix(".yaml") for x in _WEIGHTS.rglob("*.pth")
        )
        names = ", ".join(x.as_posix() for x in known) or "none"
        raise ValueError(
            f"No weights for '{config_path}' come with d2proposals; there are those of {names}."
        )
    return str(path)


def get_config(config_path: str, trained: bool = False) -> CfgNode | DictConfig:
    """A configuration with all keys of Detectron2 and of this project; of a .py file, a lazy one.

    Args:
        config_path: as for :func:`get_config_file`.
        trained: of a YAML configuration, have ``MODEL.WEIGHTS`` name the weights that come with the
            package, so that none are downloaded.

    Raises:
        ValueError: there is no such configuration, or no such weights.
    """
    weights = get_checkpoint_file(config_path) if trained else None
    if config_path.endswith(".py"):
        return LazyConfig.load(get_config_file(config_path))
    cfg = get_cfg()
    add_d2proposals_config(cfg)
    cfg.merge_from_file(get_config_file(config_path))
    if weights:
        cfg.MODEL.WEIGHTS = weights
        # Of the trunk alone, from which the training started.
        cfg.MODEL.TORCHVISION.WEIGHTS = ""
    return cfg


def get(
    config_path: str,
    trained: bool = False,
    device: str | None = None,
    *,
    weights: str | None = None,
) -> nn.Module:
    """A model in evaluation mode.

    Args:
        config_path: of a YAML configuration, as for :func:`get_config_file`.
        trained: with the weights that come with the package.
        device: where the model goes; by default where the configuration says, and on the CPU where
            there is no CUDA device.
        weights: a checkpoint instead; "" for random weights, None for those that the configuration
            names.

    Raises:
        ValueError: as :func:`get_config`; the configuration is a lazy one.
    """
    if config_path.endswith(".py"):
        raise ValueError(
            f"'{config_path}' is a lazy configuration: build its model with "
            "detectron2.config.instantiate(get_config(...).model), or take one in YAML."
        )
    cfg = get_config(config_path, trained)
    if weights is not None:
        # Those of the trunk alone would be read in vain, or make random ones others.
        cfg.MODEL.WEIGHTS, cfg.MODEL.TORCHVISION.WEIGHTS = weights, ""
    if device is not None:
        cfg.MODEL.DEVICE = str(torch.device(device))
    fit_to_device(cfg)
    check_config(cfg)
    return load_trained_model(cfg)


def _config_folder() -> Path:
    """``configs/`` of the source tree, or the package's own copy where it was installed."""
    package = Path(str(resources.files(__package__)))
    source = package.parent / "configs"
    return source if (source / "Base-ProposalNetwork.yaml").is_file() else package / "configs"
