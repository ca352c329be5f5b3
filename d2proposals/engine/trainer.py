"""The trainer: Detectron2's, with this project's mapper, evaluator and test-time augmentation."""

from __future__ import annotations

import functools
import logging
import os
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import (
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.engine import DefaultTrainer, defaults, hooks
from detectron2.evaluation import (
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
)
from detectron2.utils import comm
from torch import nn
from torch.utils.data import DataLoader

from ..data.mapper import ProposalDatasetMapper
from ..data.size_grouping import SizeGroupedBatches
from ..evaluation.coco_evaluator import SubsetCOCOEvaluator
from ..evaluation.evaluator import ProposalEvaluator
from ..evaluation.voc_evaluator import VOCEvaluator
from ..proposals.native_size_hosts import hand_over_native_sizes
from .bad_input import explain_bad_input
from .checked_datasets import (
    check_image_files,
    check_images_to_train_on,
    checked_dataset,
    with_checked_datasets,
)
from .checkpointer import ProposalCheckpointer
from .collapse import CollapseWarner
from .detector_proposals import DetectorProposalEvaluator, recorded_proposals
from .execution import prepare_execution
from .freezing import (
    check_trainable,
    freeze_parts,
    warn_of_frozen_random_layers,
    warn_of_frozen_random_parts,
)
from .job import is_two_stage, warn_of_frozen_random_norm
from .optimizer import build_optimizer
from .part_weights import load_part_weights, warn_of_random_generator
from .proposal_pictures import ProposalPictures, can_show_proposals
from .resident_memory import ResidentMemoryLogger
from .test_time_augmentation import DetectorWithTTA, ProposalNetworkWithTTA, without_test_resize
from .training_records import training_records, with_training_copies

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """Trains and evaluates any Detectron2 model with this project's data and evaluation.

    Proposal networks are evaluated by :class:`ProposalEvaluator`, detectors by Detectron2's
    evaluators (on PASCAL VOC by :class:`VOCEvaluator`) and, in the same pass, the proposals of
    two-stage detectors by the former. With ``TEST.AUG.ENABLED`` a second evaluation with test-time
    augmentation follows the last one of the training.

    Example::

        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=False)
        trainer.train()
    """

    def __init__(self, cfg: CfgNode):
        """
        Args:
            cfg: a configuration with this project's keys.

        Raises:
            ValueError: there is no iteration to train.
        """
        if cfg.SOLVER.MAX_ITER < 1:
            raise ValueError(
                f"SOLVER.MAX_ITER is {cfg.SOLVER.MAX_ITER}: there is nothing to train; --eval-only "
                "measures the network as it is."
            )
        self._last_whole_iteration = -1
        with _distributed_on_cpu(cfg.MODEL.DEVICE):
            super().__init__(cfg)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Build Detectron2's model, its parts frozen as the configuration says.

        It computes as ``MODEL.EXECUTION`` says (engine/execution.py). Its generator is told how
        large images were before they were resized, if it asks.
        """
        model = super().build_model(cfg)
        freeze_parts(cfg, model)
        return hand_over_native_sizes(prepare_execution(cfg, model))

    def resume_or_load(self, resume: bool = True) -> None:
        """Load weights as ``DefaultTrainer`` does, then those of parts that have their own.

        Args:
            resume: go on from the last checkpoint in ``OUTPUT_DIR``, if there is one. The weights
                that the configuration names are then left alone.

        Raises:
            ValueError: when the checkpoint's optimizer trains other parameters: of another model,
                or because other parts were frozen; or when it is another optimizer, or parameters
                have other shapes.
        """
        try:
            super().resume_or_load(resume)
        except ValueError as error:
            if "parameter group" not in str(error):  # torch's, about an optimizer
                raise
            raise ValueError(
                f"The last checkpoint in {self.cfg.OUTPUT_DIR} is of another model, or was trained "
                "with other parts frozen: its optimizer does not fit. Set the keys below MODEL, "
                "also MODEL.BACKBONE.FREEZE and MODEL.PROPOSAL_GENERATOR.FREEZE, as they were, or "
                "name it in MODEL.WEIGHTS and start without --resume in a new OUTPUT_DIR."
            ) from error
        if resume and self.checkpointer.has_checkpoint():
            self._check_resumed()
        else:
            warn_of_frozen_random_norm(self.cfg)
            load_part_weights(self.cfg, self.checkpointer)
            missing_keys = self.checkpointer.missing_keys
            warn_of_frozen_random_parts(self.cfg, missing_keys)
            warn_of_frozen_random_layers(self.cfg, self.checkpointer.model, missing_keys)
            warn_of_random_generator(self.cfg, self.checkpointer)

    def train(self) -> OrderedDict | None:
        """Train as ``DefaultTrainer`` does; bad input, such as a broken image, loses nothing.

        Returns:
            results of the last evaluation, if there is one.

        Raises:
            Exception: what ended the training. If that was bad input, and the first process met
                it, a checkpoint with what was learnt until then has been saved, from which
                ``--resume`` goes on.
        """
        try:
            return super().train()
        except Exception as error:
            # After a loss that became infinite the weights may be, too.
            if not isinstance(error, FloatingPointError) and explain_bad_input(error) is not None:
                self._save_what_is_learnt()
            raise

    def run_step(self) -> None:
        """Do one iteration."""
        super().run_step()
        self._last_whole_iteration = self.iter

    def _save_what_is_learnt(self) -> None:
        """Save a checkpoint of the last whole iteration of this run, if there was one."""
        if self._last_whole_iteration < 0 or not comm.is_main_process():
            return
        if self.cfg.TEST.PRECISE_BN.ENABLED and self.iter == self._last_whole_iteration:
            return  # whose statistics it may have stopped at
        name = f"model_{self._last_whole_iteration:07d}"
        is_last = self._last_whole_iteration + 1 >= self.max_iter
        if self.checkpointer.last_saved in (name, "model_final" if is_last else name):
            return
        self.iter = self._last_whole_iteration  # after which a resumed training begins
        with suppress(OSError):  # a full disk is what may have ended it
            self.checkpointer.save(name, iteration=self.iter)
            logger.info(f"{name}.pth has what was learnt so far: --resume goes on from it")

    def _check_resumed(self) -> None:
        """Check that what was resumed can be trained on.

        Raises:
            ValueError: when the checkpoint has parameters of other shapes, or another optimizer.
        """
        mend = (
            "Set the keys as they were, or name the checkpoint in MODEL.WEIGHTS and start without "
            "--resume in a new OUTPUT_DIR."
        )
        where = f"The last checkpoint in {self.cfg.OUTPUT_DIR}"
        for name, (of_file, of_model) in self.checkpointer.other_shapes.items():
            raise ValueError(
                f"{where} is of another model: {name} has the shape {of_file}, here {of_model} (is "
                f"MODEL.ROI_HEADS.NUM_CLASSES another one?). {mend}"
            )
        # An optimizer takes over the settings of the saved one, whatever that was.
        optimizer = self._trainer.optimizer
        for group in optimizer.param_groups:
            missing = sorted(optimizer.defaults.keys() - group.keys())
            if missing:
                raise ValueError(
                    f"{where} has the state of another optimizer than SOLVER.OPTIMIZER "
                    f"'{self.cfg.SOLVER.OPTIMIZER}', without {', '.join(missing)}. {mend}"
                )

    def build_hooks(self) -> list[hooks.HookBase]:
        """Return Detectron2's hooks, with safe checkpoints, pictures of proposals every
        ``VIS_PERIOD`` iterations, peak memory on the CPU, and the last, augmented evaluation."""
        # The checkpoint hook takes the checkpointer from here; Detectron2 has no method for it.
        self.checkpointer = ProposalCheckpointer(
            self.model, self.cfg.OUTPUT_DIR, trainer=weakref.proxy(self)
        )
        ret = super().build_hooks()
        ret.insert(0, CollapseWarner())
        added: list[hooks.HookBase] = []
        if can_show_proposals(self.cfg):
            added.append(ProposalPictures(self.cfg))
        if torch.device(self.cfg.MODEL.DEVICE).type == "cpu":
            added.append(ResidentMemoryLogger())
        if self.cfg.TEST.AUG.ENABLED:
            added.append(hooks.EvalHook(0, self._test_augmented))
        # Before the writers, so that they write their results too.
        index = next(
            (i for i, hook in enumerate(ret) if isinstance(hook, hooks.PeriodicWriter)), len(ret)
        )
        ret[index:index] = added
        return ret

    def _test_augmented(self) -> dict[str, Any]:
        results = self.test_with_TTA(self.cfg, self.model)
        self._last_eval_results.update(results)
        return results

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """Build the optimizer that ``SOLVER.OPTIMIZER`` names (engine/optimizer.py).

        Raises:
            ValueError: when the model has nothing to train.
        """
        check_trainable(cfg, model)
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable[list[dict[str, Any]]]:
        """Build Detectron2's training loader with :class:`ProposalDatasetMapper`.

        With dyTrainScale, whose images are of very unequal sizes, it makes batches of like ones.
        The datasets are checked (engine/checked_datasets.py), also those of the test: what is wrong
        with them shows before the training.

        Raises:
            ValueError: when the batch does not split evenly over the processes, when annotations
                mean nothing, when images are not there, or when the datasets do not fit the model
                (engine/training_records.py).
        """
        num_processes = comm.get_world_size()
        if cfg.SOLVER.IMS_PER_BATCH < 1 or cfg.SOLVER.IMS_PER_BATCH % num_processes != 0:
            raise ValueError(
                f"SOLVER.IMS_PER_BATCH ({cfg.SOLVER.IMS_PER_BATCH}) must be a positive multiple "
                f"of the number of processes ({num_processes})."
            )
        with_checked_datasets(cfg, "TEST")
        names = cfg.DATASETS.TRAIN
        cfg = with_training_copies(cfg)
        check_image_files(names, "TRAIN")
        check_image_files(cfg.DATASETS.TEST, "TEST")
        mapper, dataset = ProposalDatasetMapper(cfg, True), training_records(cfg)
        if isinstance(dataset, list):
            check_images_to_train_on(dataset, names)
        scale, batch_size = cfg.INPUT.DY_TRAIN_SCALE, cfg.SOLVER.IMS_PER_BATCH // num_processes
        if not scale.ENABLED or scale.GROUPED_BATCHES == 1 or batch_size == 1:
            return build_detection_train_loader(cfg, mapper=mapper, dataset=dataset)
        loader = build_detection_train_loader(
            cfg, mapper=mapper, dataset=dataset, total_batch_size=num_processes,
            aspect_ratio_grouping=False,
        )  # fmt: skip
        return SizeGroupedBatches(loader, batch_size, batch_size * scale.GROUPED_BATCHES)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> DataLoader:
        """Build Detectron2's test loader with :class:`ProposalDatasetMapper`."""
        mapper, name = ProposalDatasetMapper(cfg, False), dataset_name
        dataset_name = checked_dataset(cfg, name, "TEST")
        check_image_files([name], "TEST")
        if cfg.MODEL.LOAD_PROPOSALS:  # whose files are those of DATASETS.TEST, in its order
            cfg = with_checked_datasets(cfg, "TEST")
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> DatasetEvaluator:
        """Build the evaluator of a dataset.

        Args:
            cfg: a configuration.
            dataset_name: a registered dataset.
            output_folder: for the evaluator's files; by default ``inference`` in ``OUTPUT_DIR``,
                with a folder per dataset where several are tested.

        Returns:
            :class:`ProposalEvaluator` for proposal networks. Of detections :class:`VOCEvaluator`
            where the dataset's "evaluator_type" is "pascal_voc", or "coco" with a "year" beside it;
            else the stock one of that type.

        Raises:
            ValueError: for a detector on a dataset that has no stock evaluator.
        """
        if cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork":
            return cls.build_proposal_evaluator(cfg, dataset_name, output_folder)
        folder = _output_folder(cfg, dataset_name, output_folder)
        metadata = MetadataCatalog.get(dataset_name)
        evaluator_type = metadata.get("evaluator_type", None)
        # A COCO-style file of VOC's objects says so by the year in its metadata.
        if evaluator_type == "pascal_voc" or (evaluator_type == "coco" and metadata.get("year")):
            return DatasetEvaluators([VOCEvaluator(dataset_name)])
        if evaluator_type == "coco":
            name = checked_dataset(cfg, dataset_name, "TEST")
            # Where a mended copy or a dataset of an own function has no file, the evaluator writes
            # one: anew in each run, for there may be one in the folder of what the dataset was.
            evaluator = SubsetCOCOEvaluator(name, output_dir=folder, allow_cached_coco=False)
            return DatasetEvaluators([evaluator])
        if evaluator_type == "lvis":
            return DatasetEvaluators([LVISEvaluator(dataset_name, output_dir=folder)])
        raise ValueError(
            f"Dataset '{dataset_name}' has evaluator_type '{evaluator_type}'; detectors are "
            "evaluated on 'coco', 'lvis' and 'pascal_voc'."
        )

    @classmethod
    def build_proposal_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> ProposalEvaluator:
        """Build the evaluator of a dataset's proposals; arguments as ``build_evaluator``."""
        folder = _output_folder(cfg, dataset_name, output_folder)
        return ProposalEvaluator(cfg, dataset_name, output_dir=folder)

    @classmethod
    def evaluates_proposals_of_detector(cls, cfg: CfgNode) -> bool:
        """Whether ``test`` evaluates the proposals of a two-stage detector as well."""
        return cfg.TEST.PROPOSALS.OF_DETECTORS and is_two_stage(cfg)

    @classmethod
    def test(
        cls,
        cfg: CfgNode,
        model: nn.Module,
        evaluators: DatasetEvaluator | list[DatasetEvaluator] | None = None,
    ) -> OrderedDict:
        """Evaluate on ``DATASETS.TEST``; of two-stage detectors, the proposals as well.

        Args:
            cfg: a configuration.
            model: with the weights to evaluate.
            evaluators: one for each dataset, used as they are; None for those of
                ``build_evaluator`` and, unless ``TEST.PROPOSALS.OF_DETECTORS`` is False,
                ``build_proposal_evaluator``.

        Returns:
            results by task, or by dataset and task where there are several datasets.
        """
        if evaluators is not None or not cls.evaluates_proposals_of_detector(cfg):
            return super().test(cfg, model, evaluators)
        with recorded_proposals(model) as recorder:
            evaluators = [
                DatasetEvaluators(
                    [
                        cls.build_evaluator(cfg, name),
                        DetectorProposalEvaluator(
                            cls.build_proposal_evaluator(cfg, name), recorder
                        ),
                    ]
                )
                for name in cfg.DATASETS.TEST
            ]
            return super().test(cfg, model, evaluators)

    @classmethod
    def test_with_TTA(cls, cfg: CfgNode, model: nn.Module) -> OrderedDict:
        """Evaluate with test-time augmentation (``TEST.AUG``).

        Args:
            cfg: a configuration.
            model: without augmentation, a ``ProposalNetwork`` or ``GeneralizedRCNN``.

        Returns:
            as ``test``, each name with "_TTA" behind it.
        """
        logger.info(f"Evaluating with test-time augmentation, scales {cfg.TEST.AUG.MIN_SIZES}")
        is_proposal_network = cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork"
        wrapper = ProposalNetworkWithTTA if is_proposal_network else DetectorWithTTA
        augmented = wrapper(cfg, model)
        cfg = without_test_resize(cfg)
        folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
        evaluators = [cls.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST]
        results = cls.test(cfg, augmented, evaluators)
        return OrderedDict({f"{name}_TTA": value for name, value in results.items()})


def _output_folder(cfg: CfgNode, dataset_name: str, output_folder: str | None) -> str:
    """The folder of an evaluator's files: one for each dataset where several are tested."""
    folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
    return os.path.join(folder, dataset_name) if len(cfg.DATASETS.TEST) > 1 else folder


@contextmanager
def _distributed_on_cpu(device: str) -> Iterator[None]:
    """Let ``DefaultTrainer`` make a ``DistributedDataParallel`` model on CPUs within this context.

    Detectron2 always passes ``device_ids``, which torch takes for GPUs only, and offers no way to
    change that but the name its constructor looks up.
    """
    if device != "cpu" or comm.get_world_size() == 1:
        yield
        return
    create_ddp_model = defaults.create_ddp_model
    defaults.create_ddp_model = functools.partial(create_ddp_model, device_ids=None)
    try:
        yield
    finally:
        defaults.create_ddp_model = create_ddp_model
