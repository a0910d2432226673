"""Explains a classifier that is trained already; its logits stay as they are, to the bit."""

import timm
import torch
from torch.utils.data import Subset

import fastshap_vision as fv

SIZE = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 3, "num_heads": 4}


def main(epochs: int = 12, images: int = 1437, picture: str = "explanation.png") -> fv.Fidelity:
    train, test = fv.load_dataset("digits", "train"), fv.load_dataset("digits", "test")
    classifier = timm.create_model("vit_tiny_patch16_224", num_classes=10, **SIZE)
    few = Subset(train, range(images))
    # In place of this line, your own classifier, trained as you train it.
    fv.fit(classifier, few, test, objective=fv.TaskObjective(), epochs=epochs, warmup_epochs=0, batch_size=64, lr=2e-3)

    result = fv.train_explainer(classifier, few, epochs=epochs, warmup_epochs=0)
    model = result.model

    shown = torch.stack([test[index][0] for index in range(4)]).to(next(model.parameters()).device)
    model.explain(shown).plot(shown)[0].savefig(picture)
    found = fv.fidelity(model, shown[:1])  # beside the exact Shapley values
    print(f"R² {found.r2:.3f} to the exact Shapley values, {picture} shows what speaks for each prediction")
    return found


if __name__ == "__main__":
    main()
