"""The thin training API: timm models that explain themselves with Shapley values."""

from . import metrics, recipe
from .amortized import AmortizedExplainer, AmortizedObjective, SurrogateObjective
from .checkpoint import CheckpointError
from .classifier import SelfExplainingClassifier, convert
from .converged import converged_values
from .data import Preprocessing, WithMirrorImages, load_dataset
from .explanation import Explanation
from .fidelity import Fidelity, ReferenceValues, exact_values, fidelity, kernel_shap_values
from .game import UnsupportedModelError
from .interoperability import Attribution
from .memory import keep_freed_memory
from .metrics import PixelGame
from .objective import ObjectiveTerms, ShapleyObjective, TaskObjective
from .played import ExplainerObjective, PlayedGames, play
from .training import Evaluation, FitResult, TrainingError, evaluate, fit

__all__ = [
    "AmortizedExplainer",
    "AmortizedObjective",
    "Attribution",
    "CheckpointError",
    "Evaluation",
    "ExplainerObjective",
    "Explanation",
    "Fidelity",
    "FitResult",
    "ObjectiveTerms",
    "PixelGame",
    "PlayedGames",
    "Preprocessing",
    "ReferenceValues",
    "SelfExplainingClassifier",
    "ShapleyObjective",
    "SurrogateObjective",
    "TaskObjective",
    "TrainingError",
    "UnsupportedModelError",
    "WithMirrorImages",
    "converged_values",
    "convert",
    "evaluate",
    "exact_values",
    "fidelity",
    "fit",
    "keep_freed_memory",
    "kernel_shap_values",
    "load_dataset",
    "metrics",
    "play",
    "recipe",
]
