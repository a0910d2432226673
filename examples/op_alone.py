"""One op without the rest: a linear explainer of any function of coalitions, without a tensor of Shapley values."""

import torch

import fastshap_kernels as fk


def main(batch: int = 32, players: int = 49, steps: int = 300) -> float:
    torch.manual_seed(0)
    features = torch.randn(batch, players, 64)  # one row a patch
    weight = torch.zeros(10, 64, requires_grad=True)
    truth = features @ torch.randn(64, 10) / players  # an additive game: these are its Shapley values
    optimizer = torch.optim.Adam([weight], lr=3e-3)
    for step in range(steps):
        # Complements in pairs, the sizes of the Shapley kernel, one bit a player.
        bits = fk.sample_coalitions(batch, 4, players, seed=0, offset=step * batch * 4)
        values = fk.coalition_sum(truth, bits)  # v(S): your model on the masked images
        loss = fk.linear_shapley_loss(features, weight, None, bits, values)  # mean (v(S) − Σ_{p∈S} φ_p)²
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    phi = features @ weight.detach().T
    error = float((phi - truth).norm() / truth.norm())
    print(f"loss {float(loss.detach()):.2e}; Shapley values off by {error:.1%}")
    return error


if __name__ == "__main__":
    main()
