"""Training and evaluation of lazy configurations, as Detectron2's ``lazyconfig_train_net.py``.

A lazy configuration has ``model``, ``dataloader``, ``optimizer``, ``lr_multiplier`` and ``train``
(``configs/lazy/common/training.py`` says what is read of them). Checkpoints, evaluation by average
recall and recorded proposals of detectors are those of the YAML configurations' trainer.
"""

from __future__ import annotations

import difflib
import logging
import os
import traceback
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from detectron2 import config
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import AMPTrainer, SimpleTrainer, create_ddp_model, hooks
from detectron2.engine.defaults import default_writers
from detectron2.evaluation import DatasetEvaluators, inference_on_dataset, print_csv_format
from detectron2.modeling import GeneralizedRCNN
from detectron2.utils import comm
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from ..proposals.native_size_hosts import hand_over_native_sizes
from .checkpointer import ProposalCheckpointer
from .detector_proposals import DetectorProposalEvaluator, recorded_proposals
from .job import check_datasets, prepare_devices

logger = logging.getLogger(__name__)

PARTS = ("model", "dataloader", "optimizer", "lr_multiplier", "train")


class LazyCheckpointer(ProposalCheckpointer):
    """The checkpointer of lazy configurations, which have another key for the file."""

    weights_key = "train.init_checkpoint"


def load_lazy_config(args: Namespace) -> DictConfig:
    """The configuration of ``args.config_file`` with the overrides ``args.opts``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no lazy configuration of a training, or an override names nothing.
    """
    if not args.config_file or not os.path.isfile(args.config_file):
        raise FileNotFoundError(
            f"Configuration file {args.config_file or ''} is missing (--config-file); lazy ones of "
            "this project are in configs/lazy/."
        )
    if not args.config_file.endswith(".py"):
        raise ValueError(f"{args.config_file} is no lazy configuration, whose name ends in .py.")
    cfg = LazyConfig.load(args.config_file)
    missing = [name for name in PARTS if name not in cfg]
    if missing:
        raise ValueError(f"{args.config_file} has no {', '.join(missing)}.")
    for override in args.opts:
        _check_override(cfg, override)
    # Detectron2 adds what is not there, without the plus as well.
    before = {key: _value_of(cfg, key) for key in map(_key_of, args.opts)}
    try:
        cfg = LazyConfig.apply_overrides(cfg, [override.lstrip("+") for override in args.opts])
    except (HydraException, KeyError, OmegaConfBaseException) as error:
        line = str(error).strip().splitlines()[0]
        raise ValueError(
            f"Overrides KEY=VALUE of lazy configurations: {line} (a value with spaces or odd "
            "letters stands in quotes of its own: \"KEY='a b'\")."
        ) from error
    for key, value in before.items():
        _check_kind(key, value, _value_of(cfg, key))
    return cfg


def _key_of(override: str) -> str:
    return override.lstrip("+").partition("=")[0]


def _value_of(cfg: DictConfig, key: str) -> Any:
    """What a key leads to, None for nothing."""
    try:
        return OmegaConf.select(cfg, key)
    except OmegaConfBaseException:  # e.g. below a number
        return None


def _check_kind(key: str, before: Any, after: Any) -> None:
    """ValueError where a number has become text, which would fail later."""
    if isinstance(before, bool | int | float) and isinstance(after, str):
        raise ValueError(
            f"Overrides KEY=VALUE of lazy configurations: {key} is a number or a truth value, as "
            f"{before!r}, not {after!r}."
        )


def _check_override(cfg: DictConfig, override: str) -> None:
    """
    Raises:
        ValueError: it is not KEY=VALUE, or there is no such key.
    """
    key, equals, _ = override.partition("=")
    if not equals:
        raise ValueError(f"Overrides of lazy configurations are KEY=VALUE, not '{override}'.")
    if key.startswith("+"):
        return
    keys = _all_keys(cfg)
    if key in keys or _selects(cfg, key):
        return
    close = difflib.get_close_matches(key, keys, n=3)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise ValueError(
        f"The lazy configuration has no {key}.{hint} An argument that it leaves at its default is "
        f"set by +{override}."
    )


def _all_keys(node: DictConfig) -> list[str]:
    """Keys of a configuration and of what it contains, also those without a value yet."""
    keys: list[str] = []
    for key in node:
        has_value = not (OmegaConf.is_interpolation(node, key) or OmegaConf.is_missing(node, key))
        child = node[key] if has_value else None
        below = _all_keys(child) if isinstance(child, DictConfig) else []
        keys += [key, *(f"{key}.{name}" for name in below)]
    return keys


def _selects(cfg: DictConfig, key: str) -> bool:
    """Whether a key leads to something, maybe through a list or an interpolation."""
    return _value_of(cfg, key) is not None


def prepare_lazy_launch(args: Namespace) -> None:
    """:func:`prepare_launch <d2proposals.engine.job.prepare_launch>` of a lazy configuration."""
    prepare_devices(load_lazy_config(args).train.device, args.num_gpus, "train.device=cpu")


def fit_lazy_config_to_device(cfg: DictConfig) -> None:
    """Change, in place and with a warning, what this machine's device cannot do."""
    if cfg.train.device.startswith("cuda") and not torch.cuda.is_available():
        logger.warning(f"No CUDA device: train.device {cfg.train.device} becomes cpu.")
        cfg.train.device = "cpu"
    if cfg.train.amp.enabled and not cfg.train.device.startswith("cuda"):
        logger.warning("train.amp.enabled needs CUDA: it becomes False.")
        cfg.train.amp.enabled = False


def build_lazy_model(cfg: DictConfig) -> nn.Module:
    """The configuration's model on its device; its generator is told sizes of images if it asks."""
    return hand_over_native_sizes(_instantiate(cfg, "model").to(cfg.train.device))


def _instantiate(cfg: DictConfig, key: str) -> Any:
    """Build what a key of the configuration describes.

    Raises:
        ValueError: in one line, for an argument that there is not, or one that is missing.
    """
    node = OmegaConf.select(cfg, key)
    if node is None:
        raise ValueError(f"The lazy configuration has no {key}.")
    try:
        return instantiate(node)
    except TypeError as error:
        # Raised elsewhere it is an error within what is built.
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).parent
        if raised_in != Path(config.__file__).parent or "argument" not in str(error):
            raise
        raise ValueError(f"{key} of the lazy configuration: {error}.") from error


def evaluate_lazy(cfg: DictConfig, model: nn.Module) -> dict[str, Any]:
    """Evaluate proposals by average recall and, with ``dataloader.evaluators``, detections.

    Args:
        cfg: a lazy configuration.
        model: with the weights to evaluate.

    Returns:
        results by task.

    Raises:
        ValueError: the dataset is unknown, or there are several.
        FileNotFoundError: its files are missing.
    """
    _check_test_dataset(cfg)
    evaluator = _instantiate(cfg, "dataloader.proposal_evaluator")
    loader = _instantiate(cfg, "dataloader.test")
    host = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    if isinstance(host, GeneralizedRCNN):
        with recorded_proposals(model) as recorder:
            others = [instantiate(x) for x in cfg.dataloader.evaluators]
            evaluator = DetectorProposalEvaluator(evaluator, recorder)
            results = inference_on_dataset(model, loader, DatasetEvaluators([*others, evaluator]))
    else:
        results = inference_on_dataset(model, loader, evaluator)
    if comm.is_main_process():
        print_csv_format(results)
    return results or {}


def _check_test_dataset(cfg: DictConfig) -> None:
    names = cfg.dataloader.test.dataset.names
    if not isinstance(names, str):
        raise ValueError(
            f"dataloader.test.dataset.names is one dataset, not {names}: evaluate on one after the "
            "other (--eval-only)."
        )
    check_datasets([names])


def train_lazy(cfg: DictConfig, resume: bool = False) -> dict[str, Any]:
    """Train, then evaluate.

    Args:
        cfg: a lazy configuration.
        resume: go on from the last checkpoint in ``train.output_dir``.

    Returns:
        results of the last evaluation.
    """
    _check_test_dataset(cfg)
    names = cfg.dataloader.train.dataset.names
    check_datasets([names] if isinstance(names, str) else list(names))
    model = build_lazy_model(cfg)
    cfg.optimizer.params.model = model
    optimizer = _instantiate(cfg, "optimizer")
    loader = _instantiate(cfg, "dataloader.train")
    # torch takes device_ids for GPUs only. Buffers as in the YAML configurations' trainer.
    devices = {"device_ids": None} if cfg.train.device == "cpu" else {}
    settings = {"broadcast_buffers": False, **cfg.train.get("ddp", {}), **devices}
    distributed = create_ddp_model(model, **settings)
    trainer_class = AMPTrainer if cfg.train.amp.enabled else SimpleTrainer
    trainer = trainer_class(distributed, loader, optimizer)
    checkpointer = LazyCheckpointer(model, cfg.train.output_dir, trainer=trainer)
    results: dict[str, Any] = {}

    def evaluate() -> dict[str, Any]:
        results.update(evaluate_lazy(cfg, distributed))
        return results

    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=_instantiate(cfg, "lr_multiplier")),
            hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer)
            if comm.is_main_process()
            else None,
            hooks.EvalHook(cfg.train.eval_period, evaluate),
            hooks.PeriodicWriter(
                default_writers(cfg.train.output_dir, cfg.train.max_iter),
                period=cfg.train.log_period,
            )
            if comm.is_main_process()
            else None,
        ]
    )
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    start = trainer.iter + 1 if resume and checkpointer.has_checkpoint() else 0
    trainer.train(start, cfg.train.max_iter)
    return results
