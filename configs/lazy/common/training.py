"""Data, optimizer and schedule on COCO, as the YAML configurations have them."""

import functools

import torch
from detectron2.config import LazyCall as L
from detectron2.data import (
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.data import transforms as T
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

from d2proposals.data.mapper import ProposalDatasetMapper
from d2proposals.data.nonempty_resize import NonEmptyResize
from d2proposals.engine.optimizer import full_model_clipping, parameter_groups
from d2proposals.evaluation.coco_evaluator import SubsetCOCOEvaluator
from d2proposals.evaluation.evaluator import ProposalEvaluator

# Shorter sides of images in training.
MULTI_SCALE = (640, 672, 704, 736, 768, 800)


def dataloader(
    batch=16,
    train_sides=MULTI_SCALE,
    test_side=800,
    *,
    max_size=1333,
    warp_size=(),
    flips=True,
    detects=False,
    **mapping,
):
    """Loaders and evaluators of COCO 2017.

    Args:
        batch: images of an iteration.
        train_sides: shorter sides of images in training, in pixels; empty: as they were taken.
        test_side: shorter side of images in the test, in pixels; 0: as they were taken.
        max_size: bound of the longer side of resized images, in training and test, in pixels.
        warp_size: (height, width) of all images in training, in the place of ``train_sides``;
            empty: they keep their shape.
        flips: whether every second image in training is mirrored.
        detects: whether detections are evaluated; proposals always are.
        **mapping: of the mapper, e.g. ``image_format``, ``use_instance_mask``.
    """

    def resize(sides):
        if not sides:
            return []
        sides = list(sides)
        return [
            L(NonEmptyResize)(short_edge_length=sides, max_size=max_size, sample_style="choice")
        ]

    def mapper(is_train, augmentations):
        return L(ProposalDatasetMapper)(
            is_train=is_train,
            augmentations=augmentations,
            **{"image_format": "BGR", **mapping},
        )

    warp = [L(T.Resize)(shape=list(warp_size))] if warp_size else []
    flip = [L(T.RandomFlip)(horizontal=True)] if flips else []

    detections = (
        [L(SubsetCOCOEvaluator)(dataset_name="${...test.dataset.names}")] if detects else []
    )
    return {
        "train": L(build_detection_train_loader)(
            dataset=L(get_detection_dataset_dicts)(names="coco_2017_train"),
            mapper=mapper(True, [*(warp or resize(train_sides)), *flip]),
            total_batch_size=batch,
            num_workers=4,
        ),
        "test": L(build_detection_test_loader)(
            dataset=L(get_detection_dataset_dicts)(names="coco_2017_val", filter_empty=False),
            mapper=mapper(False, resize((test_side,) if test_side else ())),
            num_workers=4,
        ),
        "proposal_evaluator": L(ProposalEvaluator)(dataset_name="${..test.dataset.names}"),
        "evaluators": detections,
    }


def sgd(lr=0.02, weight_decay=0.0001, momentum=0.9, generator_lr_factor=1.0, clip_norm=None):
    """SGD with Detectron2's groups of parameters.

    Args:
        lr: learning rate.
        weight_decay: not of normalisation.
        momentum: of the steps.
        generator_lr_factor: on the generator's learning rate.
        clip_norm: bound of the norm of all gradients together.
    """
    optimizer = torch.optim.SGD
    if clip_norm is not None:
        optimizer = functools.partial(full_model_clipping(optimizer, clip_norm))
    return L(optimizer)(
        params=L(parameter_groups)(
            base_lr=lr, generator_lr_factor=generator_lr_factor, weight_decay_norm=0.0
        ),
        lr=lr,
        weight_decay=weight_decay,
        momentum=momentum,
    )


def multi_step(steps=(60000, 80000), max_iter=90000, warmup=1000, gamma=0.1):
    """The learning rate's multiplier: ``gamma`` times as much from each step on, after a linear
    warm-up."""
    return L(WarmupParamScheduler)(
        scheduler=L(MultiStepParamScheduler)(
            values=[gamma**i for i in range(len(steps) + 1)],
            milestones=list(steps),
            num_updates=max_iter,
        ),
        warmup_length=warmup / max_iter,
        warmup_factor=0.001,
    )


def job(name, max_iter=90000, weights="detectron2://ImageNetPretrained/MSRA/R-50.pkl"):
    """What tools/train_lazy.py reads of a training."""
    return {
        "output_dir": f"./output/lazy/{name}",
        "init_checkpoint": weights,
        "max_iter": max_iter,
        "seed": 1,
        "amp": {"enabled": False},
        # Of torch's DistributedDataParallel, where there are several processes.
        "ddp": {
            "broadcast_buffers": False,
            "find_unused_parameters": False,
            "fp16_compression": False,
        },
        "checkpointer": {"period": 5000, "max_to_keep": 100},
        "eval_period": 0,
        "log_period": 20,
        "device": "cuda",
    }
