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
    ("batch", "players", "coalitions", "classes"), [(20, 16, 512, 10), (4, 196, 2048, 10), (1, 196, 2048, 100)]
)
def test_kernel_shap(compare, batch, players, coalitions, classes):
    generator = torch.Generator().manual_seed(0)
    # Any coalitions will do for the time that solving takes.
    present = torch.rand(batch, coalitions, players, generator=generator) < 0.5
    bits = fk.pack_bits(present)
    values = torch.randn(batch, coalitions, classes, generator=generator)
    null, grand = torch.zeros(classes), torch.ones(batch, classes)
    compare(
        "kernel_shap",
        f"B {batch}, P {players}, M {coalitions}, K {classes}, float32",
        lambda: fk.kernel_shap(bits, values, null, grand, players=players),
        lambda: plain_kernel_shap(present, values, null, grand),
        against="a float64 solve for each image and class, without standard errors",
        bar=1.0,
        rounds=5,
    )
