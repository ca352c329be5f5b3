"""Evaluation of object proposals."""

from .evaluator import ProposalEvaluator

__all__ = ["ProposalEvaluator"]
