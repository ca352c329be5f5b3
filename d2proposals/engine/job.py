"""From command line to configuration, and what is checked before a job starts."""

import difflib
import logging
import os
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import launch
from detectron2.layers import get_norm
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    GeneralizedRCNN,
)
from detectron2.utils import comm
from PIL import Image
from torch.multiprocessing import ProcessExitedException

from ..config import add_d2proposals_config
from ..data.coco_files import register_coco_files
from .config_file import fault_of_form
from .execution import check_execution

logger = logging.getLogger(__name__)

# What Pillow has for the formats that are Detectron2's alone.
_PIXELS_OF_FORMAT = {"BGR": "RGB", "YUV-BT.601": "RGB"}


def load_config(args: Namespace) -> CfgNode:
    """Make the configuration of a job: defaults, then the file, then the overrides.

    The datasets of ``DATASETS.COCO_FILES`` are registered with it, in every process of a job.

    Args:
        args: of Detectron2's ``default_argument_parser``: ``config_file`` and ``opts`` are read.

    Returns:
        a configuration, not frozen.

    Raises:
        FileNotFoundError: when there is no such configuration file.
        ValueError: when the file is not of the form of a configuration, or the file or an override
            has an unknown key or a value of another type.
    """
    cfg = get_cfg()
    add_d2proposals_config(cfg)
    if args.config_file:
        if not os.path.isfile(args.config_file):
            raise FileNotFoundError(
                f"Configuration file {args.config_file} is missing (--config-file); the ones of "
                "this project are in configs/."
            )
        if args.config_file.endswith(".py"):
            raise ValueError(
                f"{args.config_file} is a lazy configuration, which tools/train_lazy.py trains and "
                "evaluates; this command takes those in YAML."
            )
        try:
            cfg.merge_from_file(args.config_file)
        except (TypeError, AttributeError, RecursionError) as error:
            fault = fault_of_form(args.config_file, cfg)
            if fault is None:
                raise
            raise ValueError(f"Configuration file {args.config_file}: {fault}") from error
        except (AssertionError, KeyError, ValueError, OSError, yaml.YAMLError) as error:
            raise ValueError(
                f"Configuration file {args.config_file}: {_first_line(error)}{_hint(cfg, error)}"
            ) from error
    try:
        cfg.merge_from_list(args.opts or [])
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(f"Overrides KEY VALUE: {_first_line(error)}{_hint(cfg, error)}") from error
    register_coco_files(cfg.DATASETS.COCO_FILES)
    return cfg


def prepare_launch(args: Namespace) -> None:
    """Prepare the devices (:func:`prepare_devices`) of a job with a YAML configuration.

    Args:
        args: of Detectron2's ``default_argument_parser``.

    Raises:
        ValueError: when there are fewer GPUs than processes, or as :func:`load_config`.
    """
    prepare_devices(load_config(args).MODEL.DEVICE, args.num_gpus, "MODEL.DEVICE cpu")


def prepare_devices(device: str, num_gpus: int, cpu_override: str) -> None:
    """Check the number of processes, and have Detectron2's ``launch`` pick the right backend.

    ``launch`` takes nccl wherever it sees a GPU. A job on the CPU needs gloo, so it sees none.

    Args:
        device: that the job asks for.
        num_gpus: processes of this machine.
        cpu_override: what asks for the CPU on the command line, for the message.

    Raises:
        ValueError: when there are fewer GPUs than processes.
    """
    if not device.startswith("cuda"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif torch.cuda.is_available() and num_gpus > torch.cuda.device_count():
        raise ValueError(
            f"--num-gpus {num_gpus}, but this machine has {torch.cuda.device_count()}. Take "
            f"fewer, or run on the CPU: {cpu_override}."
        )


def run_processes(main: Callable[[Namespace], Any], args: Namespace) -> None:
    """Run a job in as many processes as its command line asks for.

    Args:
        main: takes the arguments, in each process.
        args: of Detectron2's ``default_argument_parser``.

    Raises:
        SystemExit: when a process ended early, with its exit status; it has printed why.
    """
    names = ("num_machines", "machine_rank", "dist_url")
    launch_processes(main, args, args.num_gpus, **{name: getattr(args, name) for name in names})


def launch_processes(main: Callable[[Any], Any], args: Any, num_gpus: int, **settings: Any) -> None:
    """Run a job in several processes of this machine, which share its cores among their threads.

    Args:
        main: takes the arguments, in each process; of a module, if there are several.
        args: of the job.
        num_gpus: processes of this machine.
        settings: of Detectron2's ``launch``: ``num_machines``, ``machine_rank``, ``dist_url``.

    Raises:
        SystemExit: when a process ended early, with its exit status; it has printed why.
    """
    try:
        launch(_run_and_leave, num_gpus, args=(main, args, num_gpus), **settings)
    except ProcessExitedException as error:
        raise SystemExit(error.exit_code) from None


def _run_and_leave(main: Callable[[Any], Any], args: Any, num_processes: int) -> None:
    """Run a job in one of its processes, and leave the others when all are done.

    A process that ends within its group may be aborted by the group's threads.
    """
    # Each would take as many threads as there are cores, and wait for them.
    if num_processes > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(torch.get_num_threads() // num_processes, 1))
    main(args)
    if torch.distributed.is_initialized():
        comm.synchronize()
        torch.distributed.destroy_process_group()


def fit_to_device(cfg: CfgNode) -> None:
    """Change, in place and with a warning, what this machine's device cannot do.

    Without a CUDA device, ``MODEL.DEVICE`` "cuda" (Detectron2's default) becomes "cpu"; on the CPU
    there is no automatic mixed precision.
    """
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logger.warning(f"No CUDA device: MODEL.DEVICE {cfg.MODEL.DEVICE} becomes cpu.")
        cfg.MODEL.DEVICE = "cpu"
    if cfg.SOLVER.AMP.ENABLED and not cfg.MODEL.DEVICE.startswith("cuda"):
        logger.warning("SOLVER.AMP.ENABLED needs CUDA: it becomes False, training is in float32.")
        cfg.SOLVER.AMP.ENABLED = False


def warn_of_frozen_random_norm(cfg: CfgNode) -> None:
    """Warn where a network that starts from random weights has normalisation that cannot adapt."""
    if cfg.MODEL.WEIGHTS or cfg.MODEL.BACKBONE.WEIGHTS:
        return
    resnet = [("MODEL.RESNETS.NORM", cfg.MODEL.RESNETS)]
    keys = {
        "build_bn_inception_backbone": [("MODEL.BN_INCEPTION.NORM", cfg.MODEL.BN_INCEPTION)],
        "build_resnet_backbone": resnet,
        "build_resnet_fpn_backbone": resnet,
        "build_retinanet_resnet_fpn_backbone": resnet,
    }
    if not cfg.MODEL.TORCHVISION.WEIGHTS:
        torchvision = [("MODEL.TORCHVISION.NORM", cfg.MODEL.TORCHVISION)]
        keys["build_torchvision_backbone"] = torchvision
        keys["build_torchvision_fpn_backbone"] = torchvision
    keys["build_zoom_network_backbone"] = [
        ("MODEL.ZOOM_NETWORK.NORM", cfg.MODEL.ZOOM_NETWORK),
        *(keys.get(cfg.MODEL.ZOOM_NETWORK.BOTTOM_UP, [])),
    ]
    nodes = keys.get(cfg.MODEL.BACKBONE.NAME, [])
    if cfg.MODEL.ROI_HEADS.NAME == "ZIPHeads":
        nodes = [*nodes, ("MODEL.ZIP_DETECTOR.NORM", cfg.MODEL.ZIP_DETECTOR)]
    frozen = [key for key, node in nodes if node.NORM == "FrozenBN"]
    if frozen:
        logger.warning(
            f"MODEL.WEIGHTS is empty, and {' and '.join(frozen)} 'FrozenBN' normalises nothing "
            "without trained statistics. Convert pre-trained weights (tools/convert_weights.py; "
            "torchvision's: MODEL.TORCHVISION.WEIGHTS), or set 'GN' and MODEL.BACKBONE.FREEZE_AT 0 "
            "to train from scratch."
        )


def check_config(cfg: CfgNode) -> None:
    """Check what would otherwise fail late or without a clear word.

    Raises:
        ValueError: names the key and what it may be.
    """
    for key, name, registry in [
        ("MODEL.META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE, META_ARCH_REGISTRY),
        ("MODEL.BACKBONE.NAME", cfg.MODEL.BACKBONE.NAME, BACKBONE_REGISTRY),
        (
            "MODEL.PROPOSAL_GENERATOR.NAME",
            cfg.MODEL.PROPOSAL_GENERATOR.NAME,
            PROPOSAL_GENERATOR_REGISTRY,
        ),
    ]:
        known = sorted(known_name for known_name, _ in registry)
        known += ["PrecomputedProposals"] if registry is PROPOSAL_GENERATOR_REGISTRY else []
        if name not in known:
            raise ValueError(f"Unknown {key} '{name}'. Known: {', '.join(known)}.")
    _check_plain_values(cfg)
    check_execution(cfg)
    if is_two_stage(cfg) and not cfg.MODEL.PROPOSAL_GENERATOR.PROPOSALS_IN_TRAINING:
        raise ValueError(
            "MODEL.PROPOSAL_GENERATOR.PROPOSALS_IN_TRAINING must be True with "
            f"MODEL.META_ARCHITECTURE '{cfg.MODEL.META_ARCHITECTURE}': its heads train on the "
            "proposals."
        )
    has_augmentation = cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork" or is_two_stage(cfg)
    if cfg.TEST.AUG.ENABLED and (not has_augmentation or cfg.MODEL.KEYPOINT_ON):
        raise ValueError(
            "TEST.AUG.ENABLED is for proposal networks and two-stage detectors without keypoints, "
            f"not for MODEL.META_ARCHITECTURE '{cfg.MODEL.META_ARCHITECTURE}'"
            f"{' with MODEL.KEYPOINT_ON' if cfg.MODEL.KEYPOINT_ON else ''}."
        )
    is_on_zoom_network = cfg.MODEL.BACKBONE.NAME == "build_zoom_network_backbone"
    if (
        cfg.MODEL.META_ARCHITECTURE == "RetinaNet"
        and is_on_zoom_network
        and not cfg.MODEL.ZOOM_NETWORK.OUT_CHANNELS
    ):
        raise ValueError(
            "MODEL.META_ARCHITECTURE 'RetinaNet' has one head for all levels, and the levels of "
            "the zoom network differ in channels: set MODEL.ZOOM_NETWORK.OUT_CHANNELS (256 in "
            "configs/zip_single_stage.yaml)."
        )


def _check_plain_values(cfg: CfgNode) -> None:
    """ValueError for values of Detectron2's own keys that it refuses deep inside, or not at all."""
    try:
        torch.device(cfg.MODEL.DEVICE)
    except RuntimeError as error:
        raise ValueError(
            f"MODEL.DEVICE '{cfg.MODEL.DEVICE}' is no device: cpu, cuda or cuda:1."
        ) from error
    try:
        Image.new("RGB", (1, 1)).convert(_PIXELS_OF_FORMAT.get(cfg.INPUT.FORMAT, cfg.INPUT.FORMAT))
    except ValueError as error:
        raise ValueError(f"INPUT.FORMAT '{cfg.INPUT.FORMAT}' is none: BGR or RGB.") from error
    for key in ("MODEL.FPN.NORM", "MODEL.RESNETS.NORM"):
        name = cfg.MODEL[key.split(".")[1]].NORM
        try:
            get_norm(name, 32)
        except KeyError as error:
            raise ValueError(
                f"{key} '{name}' is no normalisation: '', BN, SyncBN, FrozenBN, GN or LN."
            ) from error
    sizes = cfg.INPUT.MIN_SIZE_TRAIN
    if not sizes or min(sizes) < 0 or cfg.INPUT.MIN_SIZE_TEST < 0:
        raise ValueError(
            "INPUT.MIN_SIZE_TRAIN needs one length or more of the shorter side in pixels, and "
            f"MIN_SIZE_TEST one, 0 for the images' own; got {tuple(sizes)} and "
            f"{cfg.INPUT.MIN_SIZE_TEST}."
        )
    if cfg.TEST.AUG.ENABLED and not cfg.TEST.AUG.MIN_SIZES:
        raise ValueError("TEST.AUG.MIN_SIZES is empty: name lengths of the shorter side in pixels.")
    if not min(cfg.MODEL.PIXEL_STD, default=0) > 0:
        raise ValueError(
            f"MODEL.PIXEL_STD {tuple(cfg.MODEL.PIXEL_STD)} divides the pixels: each must be above "
            "0 (1.0 divides nothing)."
        )
    for key, least in (("BASE_LR", 0), ("CHECKPOINT_PERIOD", 1), ("MAX_ITER", 0)):
        if not cfg.SOLVER[key] >= least:
            raise ValueError(f"SOLVER.{key} must be at least {least}, got {cfg.SOLVER[key]}.")
    if cfg.MODEL.PROPOSAL_GENERATOR.NAME == "RPN":
        names = cfg.MODEL.RPN.IN_FEATURES
        for key in ("SIZES", "ASPECT_RATIOS"):
            number = len(cfg.MODEL.ANCHOR_GENERATOR[key])
            if number not in (1, len(names)):
                raise ValueError(
                    f"MODEL.ANCHOR_GENERATOR.{key} has {number} lists, and MODEL.RPN.IN_FEATURES "
                    f"has {len(names)} feature maps ({', '.join(names)}): give one list for each, "
                    "or one for all."
                )


def is_two_stage(cfg: CfgNode) -> bool:
    """Whether the model is a detector whose heads take proposals.

    Args:
        cfg: its ``MODEL.META_ARCHITECTURE`` is registered: ``GeneralizedRCNN``, or a class that
            inherits from it, such as ``PanopticFPN``.
    """
    architecture = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    return isinstance(architecture, type) and issubclass(architecture, GeneralizedRCNN)


def check_datasets(names: list[str] | tuple[str, ...]) -> None:
    """Check that datasets are known and their files in place, before hours of work depend on it.

    Args:
        names: of registered datasets.

    Raises:
        ValueError: when a name is not registered.
        FileNotFoundError: when a file or folder of a dataset is missing; names it.
    """
    for name in names:
        if name not in DatasetCatalog.list():
            close = difflib.get_close_matches(name, DatasetCatalog.list(), n=3)
            close = close or ["d2p_shapes_train", "d2p_shapes_val", "coco_2017_train"]
            raise ValueError(
                f"Unknown dataset '{name}'. Did you mean "
                f"{' or '.join(close)}? COCO-style files of your own are named in "
                "DATASETS.COCO_FILES (lazy configurations register them, docs/lazy.md), other "
                "datasets registered with detectron2.data.DatasetCatalog.register."
            )
        _check_kinds_of_paths(name)
        if _missing_path(name) is None:
            continue
        # A dataset that makes its own files does so when it is read.
        try:
            DatasetCatalog.get(name)
        except FileNotFoundError as error:
            raise _missing_dataset_error(name, error.filename) from error
        if (path := _missing_path(name)) is not None:
            raise _missing_dataset_error(name, path)


def _check_kinds_of_paths(name: str) -> None:
    """ValueError where a folder stands for a dataset's file of annotations, or a file for one."""
    metadata = MetadataCatalog.get(name)
    json_file, image_root = (metadata.get(key, None) for key in ("json_file", "image_root"))
    wrong = [f"{json_file} is a folder"] if json_file and os.path.isdir(json_file) else []
    wrong += [f"{image_root} is a file"] if image_root and os.path.isfile(image_root) else []
    if wrong:
        raise ValueError(
            f"Dataset '{name}': {' and '.join(wrong)}. It needs the file of annotations and the "
            "folder of images, in DATASETS.COCO_FILES in this order: [name, file, folder]."
        )


def _missing_path(name: str) -> str | None:
    """The first of a dataset's known files and folders that is not there, None if all are."""
    metadata = MetadataCatalog.get(name)
    paths = [metadata.get(key, None) for key in ("json_file", "image_root", "dirname")]
    return next((path for path in paths if path and not os.path.exists(path)), None)


def _missing_dataset_error(name: str, path: str | None) -> FileNotFoundError:
    root = os.environ.get("DETECTRON2_DATASETS", "datasets")
    return FileNotFoundError(
        f"Dataset '{name}' needs {path}, which is missing. Set DETECTRON2_DATASETS (now '{root}') "
        "to the folder that has the datasets, or mend DATASETS.COCO_FILES; the configurations in "
        "configs/shapes/ need no download."
    )


def _first_line(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1} of {mark.name}"
        return f"{where}: {error.problem}."
    message = str(error.args[0]) if isinstance(error, KeyError) else str(error)
    return message.strip().splitlines()[0].rstrip(".") + "."


def _hint(cfg: CfgNode, error: Exception) -> str:
    """Name the keys closest to an unknown one that an error of yacs complains of."""
    message = _first_line(error).rstrip(".")
    if not message.startswith("Non-existent"):
        return ""
    unknown = message.rsplit(": ", maxsplit=1)[-1]
    close = difflib.get_close_matches(unknown, list(_all_keys(cfg)), n=3)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def _all_keys(node: CfgNode, prefix: str = "") -> list[str]:
    keys = []
    for key, value in node.items():
        keys.append(prefix + key)
        if isinstance(value, CfgNode):
            keys.extend(_all_keys(value, f"{prefix}{key}."))
    return keys
