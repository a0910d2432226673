"""The thin training API: timm models that explain themselves with Shapley values.

Results are deterministic as far as the model is: the same calls with the same seeds give the same bits on one machine.

Example, whose names all other examples use:
    >>> import timm, torch
    >>> import fastshap_kernels as fk, fastshap_vision as fv
    >>> model = fv.convert(timm.create_model("test_vit", num_classes=10, img_size=48))
    >>> images, labels = torch.randn(4, 3, 48, 48), torch.tensor([3, 1, 4, 1])
    >>> data = torch.utils.data.TensorDataset(images, labels)
    >>> model.explain(images).values.shape
    torch.Size([4, 9])
"""

from fastshap_kernels import __version__ as __version__

from . import baselines, metrics
from ._runtime.allocator import keep_freed_memory
from .data.datasets import load_dataset
from .data.mirrored import WithMirrorImages
from .data.record import record_coalitions
from .data.recorded import RecordedCoalitions
from .estimators.base import ReferenceValues
from .estimators.exact import exact_values
from .estimators.kernel_shap import kernel_shap_values
from .explanations.as_captum import Attribution
from .explanations.explanation import Explanation
from .games.base import UnsupportedModelError
from .games.coalitions import Coalitions
from .games.masked_image import MaskedImageGame
from .image_text.explanation import PairExplanation
from .image_text.model import ImageTextModel
from .images.preprocessing import Preprocessing
from .metrics.fidelity import Fidelity, fidelity
from .models.convert import convert
from .models.image_text import EmbeddingExplanation, ImageTextClassifier
from .models.refine import Calibration
from .models.self_explaining import SelfExplainingClassifier
from .objectives.base import Objective, ObjectiveTerms
from .objectives.explainer import ExplainerObjective
from .objectives.joint import JointObjective
from .objectives.task import TaskObjective
from .offline.explain_images import ExplainedImages, explain_images
from .training import recipe
from .training.callbacks import Callback, ProfilerCallback, RunStart, StepReport
from .training.evaluate import Evaluation, evaluate
from .training.fit import FitResult, fit
from .training.monitor import TrainingError
from .training.recipe import train_explainer
from .training.state import CheckpointError
from .training.stopping import TrainingStopped

__all__ = [
    "Attribution",
    "Calibration",
    "Callback",
    "CheckpointError",
    "Coalitions",
    "EmbeddingExplanation",
    "Evaluation",
    "ExplainedImages",
    "ExplainerObjective",
    "Explanation",
    "Fidelity",
    "FitResult",
    "ImageTextClassifier",
    "ImageTextModel",
    "JointObjective",
    "MaskedImageGame",
    "Objective",
    "ObjectiveTerms",
    "PairExplanation",
    "Preprocessing",
    "ProfilerCallback",
    "RecordedCoalitions",
    "ReferenceValues",
    "RunStart",
    "SelfExplainingClassifier",
    "StepReport",
    "TaskObjective",
    "TrainingError",
    "TrainingStopped",
    "UnsupportedModelError",
    "WithMirrorImages",
    "baselines",
    "convert",
    "evaluate",
    "exact_values",
    "explain_images",
    "fidelity",
    "fit",
    "keep_freed_memory",
    "kernel_shap_values",
    "load_dataset",
    "metrics",
    "recipe",
    "record_coalitions",
    "train_explainer",
]
