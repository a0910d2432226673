"""kernel_shap beside a solve for each image and class."""

import pytest
import torch

import fastshap_kernels as fk


def plain_kernel_shap(present, values, null, grand):
    """What KernelSHAP code in use does: per image and class, eliminate the last player, then least squares."""
    phi = []
    for rows, targets, total in zip(present.double(), (values - null).double(), (grand - null).double(), strict=True):
        design = rows[:, :-1] - rows[:, -1:]
        columns = []
        for k in range(targets.shape[1]):
            shifted = targets[:, k] - rows[:, -1] * total[k]
            first = torch.linalg.solve(design.T @ design, design.T @ shifted)
            columns.append(torch.cat([first, (total[k] - first.sum()).unsqueeze(0)]))
        phi.append(torch.stack(columns, 1))
    return torch.stack(phi)


@pytest.mark.parametrize(
    ("batch", "players", "coalitions", "classes"),
    [pytest.param(20, 16, 512, 10, marks=pytest.mark.short), (4, 196, 2048, 10), (1, 196, 2048, 100)],
)
def test_kernel_shap(pair, batch, players, coalitions, classes):
    # Any coalitions will do for the time that solving takes.
    present = torch.rand(batch, coalitions, players) < 0.5
    bits, values = fk.pack_bits(present), torch.randn(batch, coalitions, classes)
    null, grand = torch.zeros(classes), torch.ones(batch, classes)
    pair(
        "kernel_shap",
        f"B {batch}, P {players}, M {coalitions}, K {classes}, float32",
        "a float64 solve for each image and class, without standard errors",
        lambda: fk.kernel_shap(bits, values, null, grand, players=players),
        lambda: plain_kernel_shap(present, values, null, grand),
        rounds=5,
    )
