"""The thin training API: timm models that explain themselves with Shapley values."""

from . import metrics
from ._runtime.allocator import keep_freed_memory
from .baselines.fastshap import AmortizedExplainer, AmortizedObjective, SurrogateObjective
from .data.datasets import load_dataset
from .data.mirrored import WithMirrorImages
from .data.recorded import PlayedGames, play
from .estimators.base import ReferenceValues
from .estimators.converged import converged_values
from .estimators.exact import exact_values
from .estimators.kernel_shap import kernel_shap_values
from .explanations.as_captum import Attribution
from .explanations.explanation import Explanation
from .games.base import UnsupportedModelError
from .games.masked_image import PixelGame
from .images.preprocessing import Preprocessing
from .metrics.fidelity import Fidelity, fidelity
from .models.self_explaining import SelfExplainingClassifier, convert
from .objectives.base import ObjectiveTerms
from .objectives.explainer import ExplainerObjective
from .objectives.joint import ShapleyObjective
from .objectives.task import TaskObjective
from .training import recipe
from .training.evaluate import Evaluation, evaluate
from .training.fit import FitResult, fit
from .training.monitor import TrainingError
from .training.state import CheckpointError

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
