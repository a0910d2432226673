"""Trains a classifier and its explanation in one run."""

import torch
from torch.utils.data import Subset

import fastshap_vision as fv


def main(epochs: int = 20, images: int = 1437) -> fv.FitResult:
    train, test = fv.load_dataset("digits", "train"), fv.load_dataset("digits", "test")
    # Any timm model by its name; a residual network without batch norm, of 16 cells.
    size = {"in_chans": 1, "depths": [2], "channels": [64], "stem_type": "deep", "stem_chs": 64, "output_stride": 2}
    model = fv.SelfExplainingClassifier("nf_resnet26", num_classes=10, img_size=8, model_kwargs=size)
    # 4 coalitions an image and step, complements in pairs; the masked images are classified too.
    objective = fv.JointObjective(coalitions=4, regression_weight=3.0, masked_task_weight=1.0)
    training = {"epochs": epochs, "warmup_epochs": 0, "batch_size": 64, "lr": 2e-3}
    result = fv.fit(model, Subset(train, range(images)), test, objective=objective, **training)

    shown = torch.stack([test[index][0] for index in range(2)]).to(next(model.parameters()).device)
    explanation = model.explain(shown, target="all")  # values (2, 16, 10)
    total = explanation.values.sum(1) + explanation.null
    print(f"accuracy {result.accuracy:.1f} %; the Shapley values add up to the logits:")
    print(f"    {total[0, :3].tolist()} and {explanation.logits[0, :3].tolist()}, ...")
    return result


if __name__ == "__main__":
    main()
