"""The thin training API: timm models that explain themselves with Shapley values."""

from .classifier import SelfExplainingClassifier, convert
from .explanation import Explanation
from .game import UnsupportedModelError
from .objective import ObjectiveTerms, ShapleyObjective, TaskObjective

__all__ = [
    "Explanation",
    "ObjectiveTerms",
    "SelfExplainingClassifier",
    "ShapleyObjective",
    "TaskObjective",
    "UnsupportedModelError",
    "convert",
]
