"""A training loop of one's own: the objective gives the loss of a step, everything else is plain PyTorch."""

import torch
from torch.utils.data import DataLoader, Subset

import fastshap_vision as fv

SIZE = {"patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 3, "num_heads": 4}


def main(epochs: int = 5, images: int = 1437) -> list[float]:
    data = Subset(fv.load_dataset("digits", "train"), range(images))
    loader = DataLoader(data, batch_size=64, shuffle=True, drop_last=True)
    model = fv.SelfExplainingClassifier("vit_tiny_patch16_224", num_classes=10, img_size=8, model_kwargs=SIZE)
    objective = fv.JointObjective(coalitions=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    tasks = []
    for epoch in range(epochs):
        for step, (x, y) in enumerate(loader):
            progress = (epoch + step / len(loader)) / epochs  # λ grows over the first half
            terms = objective(model, x, y, progress=progress)
            optimizer.zero_grad()
            terms.loss.backward()
            optimizer.step()
            tasks.append(terms.task.item())
        print(f"epoch {epoch}: loss {terms.loss:.3f}, task {terms.task:.3f}, regression {terms.regression:.3f}")
    return tasks


if __name__ == "__main__":
    main()
