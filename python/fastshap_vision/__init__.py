"""The thin training API: timm models that explain themselves with Shapley values."""

from .checkpoint import CheckpointError
from .classifier import SelfExplainingClassifier, convert
from .data import Preprocessing, load_dataset
from .explanation import Explanation
from .game import UnsupportedModelError
from .objective import ObjectiveTerms, ShapleyObjective, TaskObjective
from .training import Evaluation, FitResult, TrainingError, evaluate, fit

__all__ = [
    "CheckpointError",
    "Evaluation",
    "Explanation",
    "FitResult",
    "ObjectiveTerms",
    "Preprocessing",
    "SelfExplainingClassifier",
    "ShapleyObjective",
    "TaskObjective",
    "TrainingError",
    "UnsupportedModelError",
    "convert",
    "evaluate",
    "fit",
    "load_dataset",
]
