"""Training and evaluation jobs."""

from .bad_input import bad_input_in_one_line
from .checkpointer import ProposalCheckpointer
from .execution import prepare_execution
from .freezing import check_trainable, freeze, freeze_generator, freeze_parts
from .job import (
    check_config,
    check_datasets,
    fit_to_device,
    is_two_stage,
    launch_processes,
    load_config,
    prepare_launch,
    run_processes,
    warn_of_frozen_random_norm,
)
from .part_weights import check_weights_are_whole, load_part_weights
from .proposal_files import check_proposal_files
from .test_time_augmentation import DetectorWithTTA, ProposalNetworkWithTTA, without_test_resize
from .trained_model import load_trained_model, network_input_of, without_needless_weights
from .trainer import Trainer
from .training_records import check_evaluations

__all__ = [
    "DetectorWithTTA",
    "ProposalCheckpointer",
    "ProposalNetworkWithTTA",
    "Trainer",
    "bad_input_in_one_line",
    "check_config",
    "check_datasets",
    "check_evaluations",
    "check_proposal_files",
    "check_trainable",
    "check_weights_are_whole",
    "fit_to_device",
    "freeze",
    "freeze_generator",
    "freeze_parts",
    "is_two_stage",
    "launch_processes",
    "load_config",
    "load_part_weights",
    "load_trained_model",
    "network_input_of",
    "prepare_execution",
    "prepare_launch",
    "run_processes",
    "warn_of_frozen_random_norm",
    "without_needless_weights",
    "without_test_resize",
]
