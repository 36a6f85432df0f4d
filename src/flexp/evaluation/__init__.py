"""Scores of models."""

from flexp.evaluation.scores import Scores, evaluate

__all__ = ["Scores", "evaluate"]
