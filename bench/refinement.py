"""What a few evaluations make of an explanation, and whether its errors are what it says: python -m bench.refinement.

On scikit-learn's digits, whose exact Shapley values can be computed: a plain classifier is trained, its explainer by
the recipe, and test images are explained with more and more coalitions, beside KernelSHAP of as many.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr

import fastshap_vision as fv
from bench.digits import MODELS, TRAINING
from bench.lib import machine
from bench.lib.results import RESULTS, Results

EVALUATIONS = (0, 8, 16, 32, 64, 128, 256, 512)
#: Of the intervals whose coverage is counted: 90 % of a normal variable.
DEVIATIONS, SHARE = 1.6449, 0.9


def explained(kind: str, seed: int, epochs: int | None) -> fv.SelfExplainingClassifier:
    """A classifier of the digits and its explainer, which never sees the test images."""
    torch.manual_seed(seed)
    train = fv.load_dataset("digits", "train")
    model = fv.SelfExplainingClassifier(num_classes=10, **MODELS[kind], **fv.recipe.MODEL)
    options = TRAINING if epochs is None else TRAINING | {"epochs": epochs}
    fv.fit(model.backbone, train, objective=fv.TaskObjective(), seed=seed, progress=False, **options)
    shorter = {} if epochs is None else {"epochs": epochs}
    return fv.train_explainer(model, train, seed=seed, progress=False, **shorter).model


def measure(model: fv.SelfExplainingClassifier, images: torch.Tensor) -> list[dict[str, Any]]:
    """A row for each number of evaluations."""
    truth = fv.exact_values(model, images)
    spread = (truth.phi - truth.phi.mean()).square().sum()
    rows = []
    for evaluations in EVALUATIONS:
        found = model.explain(images, "all", evaluations=evaluations, seed=1)
        error = found.values.double() - truth.phi
        true, expected = error.square().sum(1).sqrt(), found.expected_error
        # Classes differ in their errors whatever is known of an image: images are compared, class by class.
        ranks = [spearmanr(true[:, k], expected[:, k]).statistic for k in range(true.shape[1]) if evaluations]
        row = {
            "evaluations": evaluations,
            "r2": round(1 - float(error.square().sum() / spread), 4),
            "coverage": round(float((error.abs() <= DEVIATIONS * found.standard_error).double().mean()), 4),
            "expected_error": round(float(expected.mean()), 4),
            "true_error": round(float(true.mean()), 4),
            "rank_correlation": round(sum(ranks) / len(ranks), 3) if ranks else None,
            "kernel_shap_r2": None,
        }
        try:
            error = fv.kernel_shap_values(model, images, max(2, evaluations), seed=1).phi - truth.phi
            row["kernel_shap_r2"] = round(1 - float(error.square().sum() / spread), 4)
        except ValueError:  # so few coalitions that some image's values are not determined
            pass
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--images", type=int, default=40, help="test images")
    parser.add_argument("--epochs", type=int, help="of classifier and explainer, in place of the recipe's")
    parser.add_argument("--output", type=Path, default=RESULTS / "refinement.json")
    options = parser.parse_args()
    test = fv.load_dataset("digits", "test")
    images = torch.stack([test[row][0] for row in range(options.images)])
    results = Results(options.output, ("network", "seed", "evaluations"))
    for kind in options.networks:
        for seed in options.seeds:
            rows = measure(explained(kind, seed, options.epochs), images)
            results.replace([{"network": kind, "seed": seed, "images": len(images)} | row for row in rows])
            for row in rows:
                print(f"{kind}, seed {seed}: {row}", flush=True)
            results.content = machine.header() | {"rows": results.rows}
            results.write()


if __name__ == "__main__":
    main()
